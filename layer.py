"""The five layers of VGG16: a formula, then for loops that numba compiles.

Every layer has ``forward(inputs)``, which returns its output, and ``backward(out_grad)``, which takes the
gradient of the loss with respect to that output and returns the gradient with respect to the inputs.
Neither changes an array that it was given.  Pictures are stacks of planes, shape ``(N, C, H, W)``: image,
channel, row, column.

Three rules make the loops below fast without making their results depend on the machine's mood:

* the innermost loop runs along memory, so that the processor takes 8 or 16 numbers at a time;
* a number that was read is used several times before the next one is read;
* a thread writes only what it owns, and adds it up in one fixed order: any number of threads, the same bits, whichever
  of them comes to do what.

``tests/textbook.py`` holds the same formulas as the plainest loops there are.
"""
import numpy as np
from numba import get_num_threads, jit, prange, types
from numba.extending import intrinsic, register_jitable

# 'contract' lets the compiler round a * b + c once instead of twice (a fused multiply-add).  It is the one
# freedom given to it: the order of every sum stays as written.  It makes the convolutions about 1.5 times
# faster and each result slightly more accurate; every x86 since 2013 and every 64-bit Arm has the instruction.
FLAGS = {'nopython': True, 'fastmath': {'contract'}}

get_num_threads()    # starts them: some versions of numba do not, for machine code that was read from the disk

GROUP = 4            # output channels of a convolution that share each number that is read
BAND = 512           # positions of a plane that one piece of a convolution covers, at most
JOBS = 64            # that a step of a convolution is shared out to, at most
PITCH = BAND + 48    # between the sums of two channels: a power of two apart, they would evict each other
TILES = 384          # tiles that _winograd_by takes through all its steps before the next ones, at most
SIDE = 6             # numbers along the side of the largest tile
LINE = TILES + 16    # between the lines of two positions of a tile: again no power of two
SHEET = 2**16 + 16   # between what two products take of all planes, or of all weights: nor here
ROW = 4 * TILES + 16    # numbers of a row of tiles, with its frame, at most
MANY = 2**16         # windows of a weight: where it has more, each thread spreads those of the channels that it takes
OWN = 32             # so many output channels at a time
PART = 256           # and input channels, at most: a multiple of eight, see _add_eights
SHARE = 16           # output channels of a part of a step, where threads share each step
LANES = 512          # partial sums of a dot product
ASIDE = LANES + 16   # between those of two dot products: again no power of two
COLUMNS = 16384      # of a fully connected layer's input gradient that one job covers, at most


def kernel(function=None, parallel=False):
    """Compile for loops with numba, keeping the machine code on disk wherever a folder can be written."""
    if function is None:
        return lambda function: kernel(function, parallel)
    try:
        compiled = jit(parallel=parallel, cache=True, no_cfunc_wrapper=True, **FLAGS)(function)
    except RuntimeError:    # numba found no place for its cache: compile in every run
        return jit(parallel=parallel, no_cfunc_wrapper=True, **FLAGS)(function)
    save = compiled._cache.save_overload

    def save_if_there_is_room(*code):
        try:
            save(*code)
        except OSError:    # the disk is full: compile again in the next run
            pass

    compiled._cache.save_overload = save_if_there_is_room
    return compiled


def inner(function=None, parallel=False, of='', disjoint=False):
    """Compile for loops that only other compiled loops call: without an entry for Python, and kept with the caller.

    Most long loops over prange do no more than call one of these: numba goes over all that stands in such a loop again
    and again, and compiles a function of its own sooner.

    `of` tells the functions apart that one def makes: their machine code, read from the disk, goes by the def's name.
    `disjoint` promises that no array of the function shares memory with one that it writes (in C: restrict).  Else each
    of its loops compares their addresses first, which counts where a loop is short.  numba has such a flag, for its own
    use only: where a version has none, the loops do the same, but begin later.
    """
    if function is None:
        return lambda function: inner(function, parallel, of, disjoint)
    function.__qualname__ += str(of)
    compiled = jit(parallel=parallel, no_cpython_wrapper=True, no_cfunc_wrapper=True, **FLAGS)(function)
    if disjoint and hasattr(compiled, '_compiler'):
        compiled._compiler._customize_flags = _with_disjoint_arrays
    return compiled


def _with_disjoint_arrays(flags):
    if hasattr(flags, 'noalias'):
        flags.noalias = True
    return flags


# ------------------------------------------------------------------------------------ jobs that threads share

@intrinsic
def _add_one(typing, counts, k):
    """counts[k] += 1, and what it was before: no other thread can come in between.

    No loop can say that.  It is one instruction of the processor, which numba has to be told in its compiler's terms.
    """
    def instruction(context, builder, signature, arguments):
        array = context.make_array(counts)(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw('add', place, context.get_constant(types.int64, 1), 'monotonic')
    return types.int64(counts, k), instruction


@inner
def _nothing_taken(jobs):
    """What _next_job counts in: how often each job was asked for."""
    taken = np.empty(jobs, dtype=np.int64)
    for job in range(jobs):
        taken[job] = 0
    return taken


@inner
def _next_job(taken, first):
    """The first job from `first` on, and round to it again, that no thread has taken: now it is taken.  -1: none left.

    prange deals out the same number of neighbouring jobs to each thread and then waits for the slowest, whose core may
    be a smaller one or busy with other programs.  A thread that asks here begins with its own jobs as well, for which
    most of what it needs is in its cache, but goes on with those that others have not come to.  What a job computes
    does not depend on who does it.
    """
    jobs = len(taken)
    for k in range(first, first + jobs):
        job = k - jobs if k >= jobs else k
        if taken[job] == 0 and _add_one(taken, job) == 0:
            return job
    return np.int64(-1)


# ---------------------------------------------------------------------------------------- convolution loops

@intrinsic
def _align_stack(typing):
    """Let the calling function have a stack of its own that begins at a multiple of 64 bytes.

    Weights that find no register are read from there in every step.  Left to themselves they would lie across two lines
    of the cache in some processes and not in others, as a stack begins at any multiple of 16 bytes.
    """
    def attribute(context, builder, signature, arguments):
        builder.function.attributes.add('noinline')    # not its caller's; and llvmlite drops a lone alignstack
        builder.function.attributes.alignstack = 64
        return context.get_dummy_value()
    return types.none(), attribute


@intrinsic
def _widest_vectors(typing):
    """Let the calling function's loops take as many numbers at a time as the processor has room for.

    Where it has vectors of 64 bytes, the compiler takes 32 by itself on many (Intel's), as wider ones once made the
    clock slower for all that runs beside them.  What multiplies nearly all the time is faster with them.
    """
    def attribute(context, builder, signature, arguments):
        # a plain set's add: llvmlite lets through only attributes that it knows
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()
    return types.none(), attribute


@inner(disjoint=True)
def _add_taps(acc, length, x, start, done, reads, weight, first, picks, w1, w2, w3):
    """acc[c, p] += sum of weight[first + w_c + picks[t]] * x[start + reads[t] + p] over taps t from done on.

    c is one of four channels.

    The innermost loop of a convolution takes four taps.  Each x that is read serves four output channels, a to d, each
    sum that is read and written serves four taps: 16 multiply-adds for 8 loads and 4 stores, and nearly all of it
    fits into the 16 vector registers that a processor has at least.  The loops over positions are while loops, and
    the indices unsigned, because older compilers do not take several positions at a time otherwise.  They run over
    whole vectors, as the compiler can see: else it would add a loop over what is left, and keep the 16 weights in
    registers for both, or in memory.  On small planes such a loop takes a dozen steps for four taps, and what is done
    before it counts: no index is tried for counting from the end, as a signed one is, and no array for overlapping.
    """
    _align_stack()
    _widest_vectors()
    one, lanes, fours = np.uint64(1), np.uint64(512 // np.finfo(acc.dtype).bits), done + (len(reads) - done) // 4 * 4
    end = np.uint64(length) // lanes * lanes
    x, wa, wb, wc, wd = x[start:], weight[first:], weight[first + w1:], weight[first + w2:], weight[first + w3:]
    B, C, D = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH)
    for t in range(done, fours, 4):
        t0, t1, t2, t3 = np.uint64(t), np.uint64(t + 1), np.uint64(t + 2), np.uint64(t + 3)
        q0, q1 = np.uint64(picks[t0]), np.uint64(picks[t1])
        q2, q3 = np.uint64(picks[t2]), np.uint64(picks[t3])
        r0, r1 = np.uint64(reads[t0]), np.uint64(reads[t1])
        r2, r3 = np.uint64(reads[t2]), np.uint64(reads[t3])
        a0, a1, a2, a3 = wa[q0], wa[q1], wa[q2], wa[q3]
        b0, b1, b2, b3 = wb[q0], wb[q1], wb[q2], wb[q3]
        c0, c1, c2, c3 = wc[q0], wc[q1], wc[q2], wc[q3]
        d0, d1, d2, d3 = wd[q0], wd[q1], wd[q2], wd[q3]
        p = np.uint64(0)
        while p < end:
            x0, x1, x2, x3 = x[r0 + p], x[r1 + p], x[r2 + p], x[r3 + p]
            acc[p] = acc[p] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
            acc[p + B] = acc[p + B] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
            acc[p + C] = acc[p + C] + c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
            acc[p + D] = acc[p + D] + d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
            p += one
    for t in range(fours, len(reads)):    # what is left over when the number of taps is no multiple of four
        q, r = np.uint64(picks[t]), np.uint64(reads[t])
        a, b, c, d = wa[q], wb[q], wc[q], wd[q]
        p = np.uint64(0)
        while p < end:
            acc[p] = acc[p] + a * x[r + p]
            acc[p + B] = acc[p + B] + b * x[r + p]
            acc[p + C] = acc[p + C] + c * x[r + p]
            acc[p + D] = acc[p + D] + d * x[r + p]
            p += one
    for t in range(done, len(reads)):    # and of the positions
        q, r = np.uint64(picks[t]), np.uint64(reads[t])
        for p in range(end, np.uint64(length)):
            acc[p] += wa[q] * x[r + p]
            acc[p + B] += wb[q] * x[r + p]
            acc[p + C] += wc[q] * x[r + p]
            acc[p + D] += wd[q] * x[r + p]


@inner(disjoint=True)
def _add_eights(acc, length, x, start, reads, weight, first, picks, w1, w2, w3):
    """What _add_taps does, but the products of eight taps are added up, behind the sums, before they are added to them.

    An eighth as many numbers are added one after another, and most of them are smaller: it rounds less.  length must be
    one of whole vectors.  What is left over when the number of taps is no multiple of eight is left to _add_taps.
    The lines above its loops stand in _add_taps, too: as one function, they would leave the loops fewer registers.
    """
    _align_stack()
    _widest_vectors()
    one, lanes = np.uint64(1), np.uint64(512 // np.finfo(acc.dtype).bits)
    end = np.uint64(length) // lanes * lanes
    x, wa, wb, wc, wd = x[start:], weight[first:], weight[first + w1:], weight[first + w2:], weight[first + w3:]
    B, C, D, E = np.uint64(PITCH), np.uint64(2 * PITCH), np.uint64(3 * PITCH), np.uint64(GROUP * PITCH)
    for t in range(0, len(reads) // 8 * 8, 4):
        t0, t1, t2, t3 = np.uint64(t), np.uint64(t + 1), np.uint64(t + 2), np.uint64(t + 3)
        q0, q1 = np.uint64(picks[t0]), np.uint64(picks[t1])
        q2, q3 = np.uint64(picks[t2]), np.uint64(picks[t3])
        r0, r1 = np.uint64(reads[t0]), np.uint64(reads[t1])
        r2, r3 = np.uint64(reads[t2]), np.uint64(reads[t3])
        a0, a1, a2, a3 = wa[q0], wa[q1], wa[q2], wa[q3]
        b0, b1, b2, b3 = wb[q0], wb[q1], wb[q2], wb[q3]
        c0, c1, c2, c3 = wc[q0], wc[q1], wc[q2], wc[q3]
        d0, d1, d2, d3 = wd[q0], wd[q1], wd[q2], wd[q3]
        p = np.uint64(0)
        if t % 8 == 0:
            while p < end:
                x0, x1, x2, x3 = x[r0 + p], x[r1 + p], x[r2 + p], x[r3 + p]
                acc[p + E] = a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                acc[p + E + B] = b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                acc[p + E + C] = c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                acc[p + E + D] = d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
                p += one
        else:
            while p < end:
                x0, x1, x2, x3 = x[r0 + p], x[r1 + p], x[r2 + p], x[r3 + p]
                acc[p] = acc[p] + (acc[p + E] + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3)
                acc[p + B] = acc[p + B] + (acc[p + E + B] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3)
                acc[p + C] = acc[p + C] + (acc[p + E + C] + c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3)
                acc[p + D] = acc[p + D] + (acc[p + E + D] + d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3)
                p += one


@inner
def _fill(numbers, value):
    """numbers[p] = value, for all p: several at a time in older compilers, too, as the index is unsigned."""
    for p in range(np.uint64(len(numbers))):
        numbers[p] = value


@inner(disjoint=True)
def _copy(out, to, x, start, step, length):
    """out[to + p] = x[start + p * step]."""
    to, start, by = np.uint64(to), np.uint64(start), np.uint64(step)
    for p in range(np.uint64(length)):
        out[to + p] = x[start + p * by]


@inner(disjoint=True)
def _scatter(out, to, step, x, start, length):
    """out[to + p * step] = x[start + p]."""
    to, by, start = np.uint64(to), np.uint64(step), np.uint64(start)
    for p in range(np.uint64(length)):
        out[to + p * by] = x[start + p]


@inner
def _whole_vectors(length, x):
    """length, rounded up to a multiple of what the widest vector holds: 16 float32 or 8 float64."""
    lanes = 64 // x.itemsize
    return (length + lanes - 1) // lanes * lanes


@inner
def _aligned(numbers):
    """The numbers from the first one on that lies at a multiple of 64 bytes: up to 15 fewer.

    A vector of 64 bytes that begins there lies in one line of the cache, any other in two.
    """
    return numbers[-np.int64(numbers.ctypes.data) % 64 // numbers.itemsize:]


@inner
def _clear_around(plane, wide, step, place, h, height, begin, end, width):
    """Zeros in that part of a plane which belongs to the numbers of row h from begin to end.

    height * width numbers will be put into the plane, whose rows have `wide`: the first at `place`, the others `step`
    apart, down and across.  To each belongs what lies between it and the next ones, to the outermost what is left.
    """
    a, b = place // wide, place % wide
    top, bottom = h * step + a if h > 0 else 0, (h + 1) * step + a if h + 1 < height else len(plane) // wide
    left, right = begin * step + b if begin > 0 else 0, end * step + b if end < width else wide
    for y in range(top, bottom):
        _fill(plane[y * wide + left:y * wide + right], 0.0)


@inner
def _correlate_piece(acc, first, band, g, x, start, row, reads, furthest, weight, channel, picks, bias, out, image,
                     to, plane, down, across, height, width, clear):
    """One piece of _correlate's work: `band` positions of an image, from `first` on, for the channels of group g."""
    length = min(band, (height - 1) * row + width - first)
    if start + furthest + _whole_vectors(length, x) <= len(x):    # the last plane may have no room for what is dropped
        length = _whole_vectors(length, x)
    mine = min(GROUP, len(bias) - g * GROUP)
    a, b, c, d = g * GROUP, g * GROUP + min(1, mine - 1), g * GROUP + min(2, mine - 1), g * GROUP + mine - 1
    y0, y1, y2, y3 = bias[a], bias[b], bias[c], bias[d]    # past the last channel again that one, and not stored
    for p in range(length):
        acc[p], acc[PITCH + p], acc[2 * PITCH + p], acc[3 * PITCH + p] = y0, y1, y2, y3
    _add_taps(acc, length, x, start, np.int64(0), reads, weight, a * channel, picks, (b - a) * channel,
              (c - a) * channel, (d - a) * channel)
    for c in range(mine):
        for h in range(first // row, min(height, (first + band - 1) // row + 1)):
            begin, end = max(0, first - h * row), min(width, first + band - h * row)
            corner, shift = image + (g * GROUP + c) * plane, c * PITCH + h * row - first
            line = corner + to + h * down
            if clear and begin < end:
                _clear_around(out[corner:corner + plane], down // across, across, to, h, height, begin, end, width)
            if across == 1:
                one = np.int64(1)    # for a plain 1 numba would compile _copy once more
                _copy(out, line + begin, acc, shift + begin, one, end - begin)
            else:
                _scatter(out, line + begin * across, across, acc, shift + begin, end - begin)


@inner
def _correlate_jobs(job, taken, pieces, bands, groups, band, x, image, row, reads, furthest, weight, channel, picks,
                    bias, out, size, to, plane, down, across, height, width, clear):
    """The jobs of _correlate that one thread comes to, `job` the first of them."""
    jobs = len(taken)
    numbers = np.int64(GROUP * PITCH + 16)    # for a constant numba would compile np.empty once more
    acc = _aligned(np.empty(numbers, dtype=x.dtype))
    job = _next_job(taken, job)
    while job >= 0:
        for piece in range(job * pieces // jobs, (job + 1) * pieces // jobs):
            n, first, g = piece // groups // bands, piece // groups % bands * band, piece % groups
            _correlate_piece(acc, first, band, g, x, n * image + first, row, reads, furthest, weight, channel, picks,
                             bias, out, n * size, to, plane, down, across, height, width, clear)
        job = _next_job(taken, job)


@inner(parallel=True)
def _correlate(x, image, row, reads, weight, channel, picks, bias, out, images, size, to, plane, down, across, height,
               width, clear):
    """The sum at the heart of both directions of a convolution.

    For every image n < images, channel c < len(bias), row h < height and column w < width

        out[n * size + to + c * plane + h * down + w * across]
            = bias[c] + sum over taps t of weight[c * channel + picks[t]] * x[n * image + reads[t] + h * row + w]

    A tap is one term of the formula's triple sum: which number of the planes it reads, and which weight it picks.  The
    rest of a plane of out is left as it is, or made zeros if `clear` says so: a plane's rows have down // across then.

    Planes are taken as one long line of numbers, `row` of them a row: a step to the next position is then a
    step of one everywhere, and a plane of 14x14 runs as smoothly as one of 224x224.  The positions between the
    end of one row of outputs and the start of the next are computed as well, and dropped.

    A piece of the work is up to BAND consecutive positions of GROUP output channels of one image: its sums stay in the
    fastest cache while all taps are added to them, in the formula's order.  A job takes some pieces, one after the
    other.
    """
    positions = (height - 1) * row + width
    bands = (positions + BAND - 1) // BAND
    band = _whole_vectors((positions + bands - 1) // bands, x)
    groups = (len(bias) + GROUP - 1) // GROUP
    furthest = reads[0]
    for t in range(len(reads)):
        furthest = max(furthest, reads[t])
    pieces = images * bands * groups
    jobs = min(pieces, JOBS)
    taken = _nothing_taken(jobs)
    for index in prange(jobs):    # it counts in uint64: numba would compile what follows for both
        _correlate_jobs(np.int64(index), taken, pieces, bands, groups, band, x, image, row, reads, furthest, weight,
                        channel, picks, bias, out, size, to, plane, down, across, height, width, clear)


@inner
def _split_plane(plane, x, height, width, frame, step, used, rows, columns, parts):
    """One plane of _split."""
    for i in range(used):
        for j in range(used):
            left = max(0, min(columns, -((j - frame) // step)))    # the first column inside the plane
            right = max(left, min(columns, -((j - frame - width) // step)))    # and the first one behind it
            for h in range(rows):
                to, y = (((plane * used + i) * used + j) * rows + h) * columns, h * step + i - frame
                begin, end = (left, right) if 0 <= y < height else (columns, columns)
                for w in range(begin):
                    parts[to + w] = 0
                for w in range(end, columns):
                    parts[to + w] = 0
                _copy(parts, to + begin, x, (plane * height + y) * width + begin * step + j - frame, step, end - begin)


@inner(parallel=True)
def _split(x, planes, height, width, frame, step, used, rows, columns, parts):
    """Put a frame of zeros around each plane and split it into parts that a stride of `step` reads in one go.

    x (planes, height, width) becomes parts (planes, used, used, rows, columns): [plane, i, j, h, w] is the number at
    row h * step + i and column w * step + j of the plane in its frame.  A window that moves by `step` in the plane
    moves by one in each of its parts; a window smaller than the step reads only used * used of them.  Past the frame
    there are zeros, too.  With a step of 1 the only part is the framed plane.
    """
    for index in prange(planes):
        _split_plane(np.int64(index), x, height, width, frame, step, used, rows, columns, parts)


# --------------------------------------------------------------------- convolution with fewer multiplications

def _winograd_by(tile, back, inputs_of, factors, outputs_of):
    """What _correlate computes, for windows of 3x3 and a stride of 1, in tiles of tile * tile outputs.

    Along a line, two neighbouring outputs read four numbers: y0 = x0 w0 + x1 w1 + x2 w2, y1 = x1 w0 + x2 w1 + x3 w2.
    That is six multiplications.  The same two outputs with four, m_i = X_i W_i (multiply out to see it):

        X0 = x0 - x2      W0 = w0                      y0 = m0 + m1 + m2
        X1 = x1 + x2      W1 = (w0 + w2 + w1) / 2      y1 = m1 - m2 - m3
        X2 = x2 - x1      W2 = (w0 + w2 - w1) / 2
        X3 = x1 - x3      W3 = w2

    Longer lines save more: three outputs take five products in place of nine, four take six in place of twelve.  In a
    plane the step is taken down and across: for 4x4 outputs 36 products in place of 144.

    The longer the line, the larger the factors in such sums, and the more of each product's rounding error is left in
    the outputs.  float64 has plenty of digits: backward takes tiles of 4x4 outputs.  Forward, in float32, takes 3x3,
    makes the sums before and after the products in float64, and adds up eight products at a time (_add_eights): from 64
    input channels on its errors are then smaller than those of the formula, which adds one product after the other.
    (Winograd 1980; Lavin and Gray, arXiv 1509.09308, where the numbers below are written as matrices.)

    The functions that follow make such steps, on lines of `length` numbers: x_i begins at start + i * apart in x, y_i
    at to + i * by in y.  inputs_of(each, by) and outputs_of(each, line) make the function, and _row_of_weights makes it
    of `factors`, which each product takes the weights by.  Where each is not 1, the numbers of a tile lie beside each
    other in a plane: x_i of tile p (or y_i, for outputs) is i + p * each numbers from the start, whatever apart (or by)
    is.  `line` is by, or apart where by is 1.  These are constants, because otherwise the compiler has to look in every
    call whether two lines overlap, and does not take several numbers at a time where there are some dozens only.

    Returns a compiled function; the arguments are constants in it.  Its work, for one band of tiles after the other, so
    that the numbers are still in a cache for the next step:

    1. spread: the sums that the products take of the inputs, made once for all output channels, and those that they
       take of the weights, some output channels at a time;
    2. multiply: the products, each added up over all input channels.  Nearly all work is left here: for each of the
       side * side products it is a convolution of 1x1, whose positions are the tiles;
    3. gather: the outputs of those sums.

    Threads wait for each other after each step.  Where a weight has more than MANY windows, they do not: spread, these
    are several times as large as a cache (512 x 512 of them are 75 MB), but each meets few tiles.  There all threads
    spread the inputs, and then each takes OWN output channels through all that is left, PART input channels at a time,
    and a row of products after the other: what a core spreads of the weights, it multiplies itself, soon after.

    Each step goes down the columns of a tile first and then across its rows.  `side` is tile + 2, but handed on as an
    argument: with a constant the compiler unrolls all loops over a tile and takes twice as long.

    `back` turns the windows round and lets the inputs be what the weight calls outputs.
    """
    spread_down, spread_across = inputs_of(1, ROW), inputs_of(tile, SHEET)
    spread_row = _row_of_weights(factors)
    gather_down, gather_across = outputs_of(1, LINE), outputs_of(tile, SIDE * LINE)
    SPREAD, MULTIPLY, GATHER, ALL = np.int64(1), np.int64(2), np.int64(4), np.int64(7)

    @inner(of=tile)
    def spread_plane(a, b, k, x, plane, height, width, frame, first, length, across, side, line, v):
        """v[(i * side + j) * SHEET + k * line + p] = what product (i, j) of tile first + p takes of plane k.

        a and b have room for the rows of a line of tiles, before and after the sums down its columns.
        """
        by, one = np.int64(ROW), np.int64(1)
        for h in range(first // across, (first + length - 1) // across + 1):
            begin, end = max(0, first - h * across), min(across, first + length - h * across)
            y, shift, columns = h * tile - frame, begin * tile - frame, (end - begin) * tile + side - tile
            left = max(0, min(columns, -shift))    # the first of these tiles' columns that is inside the plane
            right = max(left, min(columns, width - shift))    # and the first one behind it
            corner = ((plane + k) * height + y) * width + shift + left
            if y >= 0 and y + side <= height:
                spread_down(b, left, x, corner, width, right - left)
            else:
                for i in range(side):    # some of the rows are zeros
                    if 0 <= y + i < height:
                        _copy(a, i * by + left, x, corner + i * width, one, right - left)
                    else:
                        for w in range(left, right):
                            a[i * by + w] = 0
                spread_down(b, left, a, left, by, right - left)
            for i in range(side):
                for w in range(left):
                    b[i * ROW + w] = 0
                for w in range(right, columns):
                    b[i * ROW + w] = 0
                spread_across(v, i * side * SHEET + k * line + h * across + begin - first, b, i * ROW, one, end - begin)
        # what fills the last vector is multiplied, too: numbers that happen to lie there may be such as take far longer
        for i in range(side * side):
            for p in range(length, line):
                v[i * SHEET + k * line + p] = 0

    @inner(of=tile)
    def separate(a, weight, planes, channels, k, some, top, mine):
        """a[(3 * i + j) * some * mine + w] = number (i, j) of window w, or of that window turned round.

        These are the windows from `some` planes, k the first, to `mine` channels, top the first.  They lie in the
        weight in rows, backward one for each plane, forward one for each channel.
        """
        rows, count = (some, mine) if back else (mine, some)
        first, apart = (k * channels + top, channels) if back else (top * planes + k, planes)
        for r in range(rows):
            for j in range(9):
                _copy(a, ((8 - j if back else j) * rows + r) * count, weight, (first + r * apart) * 9 + j, np.int64(9),
                      count)

    @inner(of=tile)
    def spread_weights(a, some, mine, i, pitch, to, packed):
        """packed[j * SHEET + to + r * pitch + q] = what product (i, j) takes of window q of row r, which a holds apart.
        """
        rows, count = (some, mine) if back else (mine, some)
        length, (u, v, w) = rows * count, factors[i]
        together = rows if count == pitch else np.int64(1)    # rows that lie one behind the other
        for r in range(0, rows, together):
            spread_row(packed, to + r * pitch, a, r * count, length, together * count, u, v, w)

    @inner(of=tile)
    def multiply(acc, m, q, c, some, rows, k, line, v, reads, packed, sheet, picks, channel):
        """m[(q * rows + c) * line + p] = product q of tile p in channel c, over the planes up to k + len(reads).

        Those of the planes before k are there already.  The next three channels alike: past the last of `some` it
        is that one once more, for which m has room, and what comes of it is not gathered.
        """
        to, done, one = (q * rows + c) * line, np.int64(0), np.int64(1)
        w1, w2, w3 = min(some - 1, 1) * channel, min(some - 1, 2) * channel, min(some - 1, 3) * channel
        if k == 0:
            for p in range(line):
                acc[p], acc[PITCH + p], acc[2 * PITCH + p], acc[3 * PITCH + p] = 0, 0, 0, 0
        else:
            for i in range(GROUP):
                _copy(acc, i * PITCH, m, to + i * line, one, line)
        start, first = q * SHEET + k * line, sheet * SHEET + c * channel
        if not back:    # numba compiles this for forward only
            if acc.itemsize == 4:
                _add_eights(acc, line, v, start, reads, packed, first, picks, w1, w2, w3)
                done = len(reads) // 8 * 8
        _add_taps(acc, line, v, start, done, reads, packed, first, picks, w1, w2, w3)
        for i in range(GROUP):
            _copy(m, to + i * line, acc, i * PITCH, one, line)

    @inner(of=tile)
    def gather_plane(m, o, rows, line, first, length, across, side, bias, plane):
        """The outputs of one channel, of its sums m[((i * side + j) * rows + o) * line + p]."""
        b, last = np.empty(np.int64(SIDE * SIDE * LINE), dtype=np.float64), np.empty(np.int64(SIDE), dtype=plane.dtype)
        zero, one, apart = np.int64(0), np.int64(1), np.int64(SIDE * LINE)
        for j in range(side):
            gather_down(b, j * apart, m, (j * rows + o) * line, side * rows * line, length, 0.0)
        height, width = plane.shape
        for h in range(first // across, (first + length - 1) // across + 1):
            begin, end = max(0, first - h * across), min(across, first + length - h * across)
            whole = min(end, width // tile)
            for i in range(min(tile, height - h * tile)):
                row, start = plane[h * tile + i], i * LINE + h * across - first
                gather_across(row, begin * tile, b, start + begin, apart, whole - begin, bias)
                if whole < end:    # the last tile lies across the edge of the plane
                    gather_across(last, zero, b, start + whole, apart, one, bias)
                    for w in range(whole * tile, width):
                        row[w] = last[w - whole * tile]

    @inner(of=tile)
    def work(step, job, taken, begin, end, sizes, n, first, length, top, mine, x, weight, bias, v, packed, reads, picks,
             m, out):
        """The jobs of share that one thread comes to, `job` the first of them."""
        job, jobs = _next_job(taken, job), len(taken)
        if job < 0:
            return
        planes, height, width, frame, channels, across, side, line, pitch, own = sizes
        zero, products, numbers = np.int64(0), side * side, np.int64(SIDE * ROW)
        a, b = np.empty(numbers, dtype=x.dtype), _aligned(np.empty(numbers + 16, dtype=np.float64))
        windows = np.empty(np.int64(9 * OWN * PART), dtype=weight.dtype)
        acc = _aligned(np.empty(np.int64(2 * GROUP * PITCH + 16), dtype=out.dtype))
        channel, blocks = np.int64(1) if back else pitch, (mine + own - 1) // own
        rows, part = (mine + GROUP - 1) // GROUP * GROUP, planes if step == MULTIPLY else np.int64(PART)
        if step == ALL:    # nobody else needs what lies between the steps
            rows, packed = own, _aligned(np.empty(side * SHEET + 16, dtype=out.dtype))
            m = _aligned(np.empty(products * own * line + 16, dtype=out.dtype))
        while job >= 0:
            for u in range(begin + job * (end - begin) // jobs, begin + (job + 1) * (end - begin) // jobs):
                if step == SPREAD and u >= blocks:
                    spread_plane(a, b, u - blocks, x, n * planes, height, width, frame, first, length, across, side,
                                 line, v)
                    continue
                q, c = u // blocks, u % blocks * own    # the first product and channel of this part
                last, some = q + 1 if step == MULTIPLY else products, min(own, mine - c)
                o = zero if step == ALL else c    # where these channels begin in packed and in m
                for k in range(0, planes, part):
                    along, t = min(part, planes - k), zero if step == ALL else k
                    if step & SPREAD:
                        separate(windows, weight, planes, channels, k, along, top + c, some)
                    for i in range(q, last):
                        sheet = i % side if step == ALL else i
                        if step & SPREAD and i % side == 0:
                            spread_weights(windows, along, some, i // side, pitch,
                                           sheet * SHEET + o * channel + picks[t], packed)
                        if step & MULTIPLY:
                            for g in range(o, o + some, GROUP):
                                multiply(acc, m, i, g, o + some - g, rows, k, line, v, reads[:along], packed, sheet,
                                         picks[t:], channel)
                if step & GATHER:
                    for g in range(some):
                        gather_plane(m, o + g, rows, line, first, length, across, side, bias[top + c + g],
                                     out[n, top + c + g])
            job = _next_job(taken, job)

    @inner(parallel=True, of=tile)
    def share(step, begin, end, sizes, n, first, length, top, mine, x, weight, bias, v, packed, reads, picks, m, out):
        """The parts begin to end of a step, in jobs that threads share, for `length` tiles of image n from `first` on.

        A part is some of the `mine` output channels from `top` on; to MULTIPLY, one product of these.  In SPREAD, the
        planes of the inputs come behind: short parts in the end, as whoever is done then waits.  ALL: the three steps
        one after the other.
        """
        jobs = min(end - begin, JOBS)
        taken = _nothing_taken(jobs)
        for index in prange(jobs):
            work(step, np.int64(index), taken, begin, end, sizes, n, first, length, top, mine, x, weight, bias, v,
                 packed, reads, picks, m, out)

    @inner(of=tile)
    def winograd(x, height, width, frame, weight, bias, out):
        batch, channels, out_height, out_width = out.shape
        # numba would compile once more for plain ints
        zero, one, side = np.int64(0), np.int64(1), np.int64(tile + 2)
        products, planes = side * side, len(weight) // 9 // channels
        across = (out_width + tile - 1) // tile
        tiles = (out_height + tile - 1) // tile * across
        many = planes * channels > MANY
        most = TILES // 3 if many else 3 * TILES // 4 if back else TILES    # float64 fills the caches sooner
        most = min(most, SHEET // planes // 16 * 16)
        bands = (tiles + most - 1) // most
        line = _whole_vectors((tiles + bands - 1) // bands, out)
        bands = (tiles + line - 1) // line
        # output channels at a time: eight vectors, so that less falls out of a cache, or what a sheet has room for
        block = channels if many else min(channels, 512 // out.itemsize, (SHEET // planes - 8) // 8 * 8)
        if many:    # from one row of packed weights to the next
            pitch = np.int64(OWN) if back else min(planes, PART)
        else:
            pitch = _whole_vectors(block, out) + 8 if back else planes + 4
        own = np.int64(OWN if many else SHARE)    # channels of a part
        sizes = planes, height, width, frame, channels, across, side, line, pitch, own
        shared = zero if many else products    # else each thread has room of its own
        packed = _aligned(np.empty(shared * SHEET + 16, dtype=out.dtype))
        m = _aligned(np.empty(shared * (block + GROUP) * line + 16, dtype=out.dtype))
        v = _aligned(np.empty(products * SHEET + 16, dtype=out.dtype))
        reads, picks = np.empty(planes, dtype=np.int64), np.empty(planes, dtype=np.int64)
        for k in range(planes):
            reads[k], picks[k] = k * line, k * pitch if back else k
        for index in range(batch * bands):
            n, first = index // bands, index % bands * line
            length = min(line, tiles - first)
            for top in range(0, channels, block):
                mine = min(block, channels - top)
                blocks = (mine + own - 1) // own
                for k in range(2 if many else 3):
                    step = ALL if many and k == 1 else SPREAD << k
                    begin, end = zero, blocks * (products if step == MULTIPLY else one)
                    if step == SPREAD:
                        begin = blocks if many or index > 0 and block == channels else zero
                        end = blocks + planes if top == 0 else blocks
                    share(step, begin, end, sizes, n, first, length, top, mine, x, weight, bias, v, packed, reads,
                          picks, m, out)

    return winograd


def _row_of_weights(factors):
    """A step that makes what the products of one row take of the weights, for `length` windows.

    The weights are first added up down their columns, by the row's own factors u, v and w, then across by all factors.
    Number (i, j) of window p is x[start + (3 * i + j) * apart + p]; product j takes y[to + j * SHEET + p] of it.
    """
    (a1, b1, c1), (a2, b2, c2), (a3, b3, c3), (a4, b4, c4) = factors[1:5]
    six = len(factors) == 6

    @inner(of=len(factors), disjoint=True)
    def step(y, to, x, start, apart, length, u, v, w):
        to, start, n = np.uint64(to), np.uint64(start), np.uint64(apart)
        n2, n3, n4, n5 = np.uint64(2) * n, np.uint64(3) * n, np.uint64(4) * n, np.uint64(5) * n
        n6, n7, n8 = np.uint64(6) * n, np.uint64(7) * n, np.uint64(8) * n
        t1, t2, t3 = np.uint64(SHEET), np.uint64(2 * SHEET), np.uint64(3 * SHEET)
        t4, t5 = np.uint64(4 * SHEET), np.uint64(5 * SHEET)
        for p in range(np.uint64(length)):
            q = start + p
            w0 = u * np.float64(x[q]) + v * np.float64(x[q + n3]) + w * np.float64(x[q + n6])
            w1 = u * np.float64(x[q + n]) + v * np.float64(x[q + n4]) + w * np.float64(x[q + n7])
            w2 = u * np.float64(x[q + n2]) + v * np.float64(x[q + n5]) + w * np.float64(x[q + n8])
            y[to + p] = w0
            y[to + t1 + p] = a1 * w0 + b1 * w1 + c1 * w2
            y[to + t2 + p] = a2 * w0 + b2 * w1 + c2 * w2
            y[to + t3 + p] = a3 * w0 + b3 * w1 + c3 * w2
            y[to + t4 + p] = a4 * w0 + b4 * w1 + c4 * w2
            if six:
                y[to + t5 + p] = w2
    return step


def _three_inputs(each, by):
    """What five products take of five inputs: two polynomials multiplied by way of 0, 1, -1/2, -2 and infinity."""
    @inner(of=each, disjoint=True)
    def step(y, to, x, start, apart, length):
        to, start, s1 = np.uint64(to), np.uint64(start), np.uint64(apart if each == 1 else 1)
        n, s2, s3, s4 = np.uint64(each), np.uint64(2) * s1, np.uint64(3) * s1, np.uint64(4) * s1
        t1, t2, t3, t4 = np.uint64(by), np.uint64(2 * by), np.uint64(3 * by), np.uint64(4 * by)
        # across, a tile begins with the two numbers that the one before ends with
        x3, x4 = (0.0, 0.0) if each == 1 else (np.float64(x[start]), np.float64(x[start + s1]))
        for p in range(np.uint64(length)):
            x0, x1 = (np.float64(x[start + p]), np.float64(x[start + s1 + p])) if each == 1 else (x3, x4)
            x2, x3 = np.float64(x[start + s2 + p * n]), np.float64(x[start + s3 + p * n])
            x4 = np.float64(x[start + s4 + p * n])
            y[to + p] = x0 - x3 + 1.5 * (x1 - x2)
            y[to + t1 + p] = x1 + x3 + 2.5 * x2
            y[to + t2 + p] = x2 + x3 - 2 * x1
            y[to + t3 + p] = x3 - 0.5 * (x1 + x2)
            y[to + t4 + p] = x4 - x1 + 1.5 * (x3 - x2)
    return step


def _three_outputs(each, line):
    """Three outputs of five products."""
    @inner(of=each, disjoint=True)
    def step(y, to, x, start, apart, length, bias):
        by, apart = (line, apart) if each == 1 else (1, line)
        to, start, n = np.uint64(to), np.uint64(start), np.uint64(each)
        s1, s2, s3, s4 = np.uint64(apart), np.uint64(2 * apart), np.uint64(3 * apart), np.uint64(4 * apart)
        t1, t2 = np.uint64(by), np.uint64(2 * by)
        more = 0.0 if each == 1 else bias
        for p in range(np.uint64(length)):
            m0, m1, m2 = np.float64(x[start + p]), np.float64(x[start + s1 + p]), np.float64(x[start + s2 + p])
            m3, m4 = np.float64(x[start + s3 + p]), np.float64(x[start + s4 + p])
            y[to + p * n] = m0 + m1 + m2 + m3 + more
            y[to + t1 + p * n] = m1 - 0.5 * m2 - 2 * m3 + more
            y[to + t2 + p * n] = m1 + 0.25 * m2 + 4 * m3 + m4 + more
    return step


def _four_inputs(each, by):
    """What six products take of six inputs: the same by way of 0, 3/2, -3/2, 2/3, -2/3 and infinity."""
    @inner(of=each, disjoint=True)
    def step(y, to, x, start, apart, length):
        to, start, s1 = np.uint64(to), np.uint64(start), np.uint64(apart if each == 1 else 1)
        n, s2, s3, s4 = np.uint64(each), np.uint64(2) * s1, np.uint64(3) * s1, np.uint64(4) * s1
        s5 = np.uint64(5) * s1
        t1, t2, t3, t4, t5 = np.uint64(by), np.uint64(2 * by), np.uint64(3 * by), np.uint64(4 * by), np.uint64(5 * by)
        # as above
        x4, x5 = (0.0, 0.0) if each == 1 else (np.float64(x[start]), np.float64(x[start + s1]))
        for p in range(np.uint64(length)):
            x0, x1 = (np.float64(x[start + p]), np.float64(x[start + s1 + p])) if each == 1 else (x4, x5)
            x2, x3 = np.float64(x[start + s2 + p * n]), np.float64(x[start + s3 + p * n])
            x4, x5 = np.float64(x[start + s4 + p * n]), np.float64(x[start + s5 + p * n])
            a, b = x4 - 4 / 9 * x2, (x3 - 4 / 9 * x1) * (3 / 2)
            c, d = x4 - 9 / 4 * x2, (x3 - 9 / 4 * x1) * (2 / 3)
            y[to + p] = x0 + x4 - 97 / 36 * x2
            y[to + t1 + p] = a + b
            y[to + t2 + p] = a - b
            y[to + t3 + p] = c + d
            y[to + t4 + p] = c - d
            y[to + t5 + p] = x1 + x5 - 97 / 36 * x3
    return step


def _four_outputs(each, line):
    """Four outputs of six products."""
    @inner(of=each, disjoint=True)
    def step(y, to, x, start, apart, length, bias):
        by, apart = (line, apart) if each == 1 else (1, line)
        to, start, n = np.uint64(to), np.uint64(start), np.uint64(each)
        s1, s2, s3 = np.uint64(apart), np.uint64(2 * apart), np.uint64(3 * apart)
        s4, s5 = np.uint64(4 * apart), np.uint64(5 * apart)
        t1, t2, t3 = np.uint64(by), np.uint64(2 * by), np.uint64(3 * by)
        more = 0.0 if each == 1 else bias
        for p in range(np.uint64(length)):
            m0, m1, m2 = np.float64(x[start + p]), np.float64(x[start + s1 + p]), np.float64(x[start + s2 + p])
            m3, m4, m5 = np.float64(x[start + s3 + p]), np.float64(x[start + s4 + p]), np.float64(x[start + s5 + p])
            a, b, c, d = m1 + m2, m1 - m2, m3 + m4, m3 - m4
            y[to + p * n] = m0 + a + c + more
            y[to + t1 + p * n] = 3 / 2 * b + 2 / 3 * d + more
            y[to + t2 + p * n] = 9 / 4 * a + 4 / 9 * c + more
            y[to + t3 + p * n] = 27 / 8 * b + 8 / 27 * d + m5 + more
    return step


# what each of the five, or six, products takes of three weights
FIVE = (1., 0., 0.), (2 / 9, 2 / 9, 2 / 9), (8 / 9, -4 / 9, 2 / 9), (-1 / 9, 2 / 9, -4 / 9), (0., 0., 1.)
SIX = ((1., 0., 0.), (8 / 65, 12 / 65, 18 / 65), (8 / 65, -12 / 65, 18 / 65), (-81 / 130, -54 / 130, -36 / 130),
       (-81 / 130, 54 / 130, -36 / 130), (0., 0., 1.))
_winograd_three = _winograd_by(3, False, _three_inputs, FIVE, _three_outputs)
_winograd_four = _winograd_by(4, True, _four_inputs, SIX, _four_outputs)


@register_jitable    # for Python and for compiled loops
def _winograd_pays(read, written, height, width):
    """Whether enough channels are read, at enough positions, to make sums of them beforehand; and room for the sums."""
    return 32 <= read and max(read, written) <= SHEET // 16 and min(height, width) >= 14


# --------------------------------------------------------------------------------------- convolution, both ways

@kernel
def _outputs_of_inputs(inputs, outputs, weight, bias, kernel_size, stride, padding):
    """Fill outputs with the convolution of inputs, in a frame of `padding` zeros, and return them.

    The taps are the formula's terms in its order: (k, i, j) reads plane k, shifted by i rows and j columns.  With a
    stride, the shift picks one of the plane's parts (see _split) and a smaller shift in it.  Windows of 3x3 over many
    channels take Winograd's way (see _winograd_by), in float32 only over so many that it errs less than the formula,
    and only for so many that it is faster.
    """
    batch, in_channels, height, width = inputs.shape
    out_channels, out_height, out_width = outputs.shape[1:]
    K, S, P = kernel_size, stride, padding
    x, weights = np.ascontiguousarray(inputs).reshape(-1), np.ascontiguousarray(weight).reshape(-1)
    enough = out_channels >= 32 and (in_channels >= 64 or outputs.itemsize == 8)
    if K == 3 and S == 1 and enough and _winograd_pays(in_channels, out_channels, out_height, out_width):
        _winograd_three(x, height, width, P, weights, bias, outputs)
        return outputs
    used, rows, columns = min(S, K), (height + 2 * P + S - 1) // S, (width + 2 * P + S - 1) // S
    if S > 1 or P > 0:
        planes, x = x, np.empty(batch * in_channels * used * used * rows * columns, dtype=inputs.dtype)
        _split(planes, batch * in_channels, height, width, P, S, used, rows, columns, x)
    taps = in_channels * K * K
    reads, picks = np.empty(taps, dtype=np.int64), np.empty(taps, dtype=np.int64)
    for t in range(taps):
        k, i, j = t // K // K, t // K % K, t % K
        part = (k * used + i % S) * used + j % S
        reads[t] = (part * rows + i // S) * columns + j // S
        picks[t] = t
    size = out_height * out_width
    _correlate(x, in_channels * used * used * rows * columns, columns, reads, weights, taps, picks, bias,
               outputs.reshape(-1), batch, out_channels * size, np.int64(0), size, out_width, np.int64(1), out_height,
               out_width, False)
    return outputs


@register_jitable
def _winograd_goes_back(out_grad, in_grad, kernel_size, stride):
    """Whether _gradient_by_winograd serves: in float64 only, as for float32 tiles of 4x4 would be too coarse."""
    return kernel_size == 3 and stride == 1 and in_grad.itemsize == 8 and _winograd_pays(
        out_grad.shape[1], in_grad.shape[1], out_grad.shape[2], out_grad.shape[3])


@kernel
def _gradient_by_winograd(out_grad, in_grad, weight, padding):
    """What _gradient_of_inputs does for windows of 3x3 over many channels, without the formula's loops.

    The few channels of a picture take it, too, although it is no faster for them: so main.py needs no gradient by the
    formula, and a first run does not compile its loops for float64.
    """
    height, width = out_grad.shape[2:]
    planes, weights = np.ascontiguousarray(out_grad).reshape(-1), np.ascontiguousarray(weight).reshape(-1)
    nothing = np.zeros(in_grad.shape[1], dtype=in_grad.dtype)
    _winograd_four(planes, height, width, 2 - padding, weights, nothing, in_grad)
    return in_grad


@kernel
def _gradient_of_inputs(out_grad, in_grad, weight, kernel_size, stride, padding):
    """Fill in_grad with the gradient of a convolution's inputs and return it.  out_grad has its dtype, too.

    Forward, row h * S + i of the padded inputs meets row h of the outputs.  Backward, row q * S + d of the padded
    inputs, 0 <= d < S, collects from the rows q - u of out_grad for every i = u * S + d < K: the same sum with the
    window's taps in reverse, once for each remainder of the rows and of the columns.  Row h * S + a of the inputs
    themselves is row h * S + a + P of the padded ones: q is h plus a few rows.  The planes of out_grad get a frame of
    zeros, wide enough for the largest u.  Windows of 3x3 over many channels take Winograd's way, as above.
    """
    if _winograd_goes_back(out_grad, in_grad, kernel_size, stride):
        return _gradient_by_winograd(out_grad, in_grad, weight, padding)
    batch, out_channels, out_height, out_width = out_grad.shape
    in_channels, height, width = in_grad.shape[1:]
    K, S, P = kernel_size, stride, padding
    planes, weights = np.ascontiguousarray(out_grad).reshape(-1), np.ascontiguousarray(weight).reshape(-1)
    nothing, one = np.zeros(in_channels, dtype=in_grad.dtype), np.int64(1)
    numbers = in_grad.reshape(-1)
    # whether no window has read some of the inputs: then the first of the sums that follow clears the rest
    clear = K < S or (out_height - 1) * S + K < height + P or (out_width - 1) * S + K < width + P
    frame = (K - 1) // S
    rows, columns = out_height + 2 * frame, out_width + 2 * frame
    x = planes
    if frame > 0:
        x = np.empty(batch * out_channels * rows * columns, dtype=in_grad.dtype)
        _split(planes, batch * out_channels, out_height, out_width, frame, one, one, rows, columns, x)
    typed = np.empty(len(weights), dtype=in_grad.dtype)    # the weights in the dtype of the sums
    for p in range(len(weights)):
        typed[p] = weights[p]
    for place in range(S * S):
        a, b = place // S, place % S
        more, d, right, e = (a + P) // S, (a + P) % S, (b + P) // S, (b + P) % S
        tall, wide = (K - 1 - d) // S + 1, (K - 1 - e) // S + 1
        high = min(out_height + tall - 1 - more, (height - a + S - 1) // S)
        broad = min(out_width + wide - 1 - right, (width - b + S - 1) // S)
        if min(tall, wide, high, broad) < 1:    # no window reaches these
            continue
        reads = np.empty(out_channels * tall * wide, dtype=np.int64)
        picks = np.empty(out_channels * tall * wide, dtype=np.int64)
        for t in range(len(reads)):
            c, u, v = t // wide // tall, tall - 1 - t // wide % tall, wide - 1 - t % wide
            reads[t] = (c * rows + frame + more - u) * columns + frame + right - v
            picks[t] = (c * in_channels * K + u * S + d) * K + v * S + e
        _correlate(x, out_channels * rows * columns, columns, reads, typed, K * K, picks, nothing, numbers, batch,
                   in_channels * height * width, a * width + b, height * width, S * width, S, high, broad, clear)
        clear = False
    if clear:    # no window has read any
        _fill(numbers, 0.0)
    return in_grad


# -------------------------------------------------------------------------------------------- pooling loops

@inner(disjoint=True)
def _take_larger(best, index, numbers, candidate):
    """Where numbers[w] beats best[w], put it there and note its index in the window.

    A NaN beats every number, as in np.max; the first one among equals stays.  Both branches of each choice are
    computed, with & and |, because a jump would keep the processor from comparing several windows at a time.
    """
    for w in range(len(best)):
        x, b = numbers[w], best[w]
        wins = (x > b) | ((x != x) & (b == b))
        best[w] = x if wins else b
        index[w] = candidate if wins else index[w]


@inner
def _pool_plane(outputs, inputs, argidx, width, out_width, kernel_size, stride):
    """One plane of _pool, as a list of numbers: some rows of windows at a time, one (i, j) after another."""
    out_height, some = len(outputs) // out_width, max(1, 512 // out_width)    # short rows one by one would take longer
    numbers = np.empty(some * out_width, dtype=inputs.dtype)
    for first in range(0, out_height, some):
        last = min(out_height, first + some)
        best, index = outputs[first * out_width:last * out_width], argidx[first * out_width:last * out_width]
        _fill(best, -np.inf)
        _fill(index, 0.0)
        for i in range(kernel_size):
            for j in range(kernel_size):
                for h in range(first, last):
                    _copy(numbers, (h - first) * out_width, inputs, (h * stride + i) * width + j, stride, out_width)
                _take_larger(best, index, numbers, np.int32(i * kernel_size + j))


@inner(disjoint=True)
def _add_at_maxima(in_grad, first, step, places, out_grad, argidx, start, length):
    """in_grad[first + w * step + places[argidx[start + w]]] += out_grad[start + w] for w < length."""
    first, step, start = np.uint64(first), np.uint64(step), np.uint64(start)
    for w in range(np.uint64(length)):
        place = first + w * step + np.uint64(places[np.uint64(argidx[start + w])])
        in_grad[place] = in_grad[place] + out_grad[start + w]


@inner
def _pool_back_plane(out_grad, in_grad, argidx, width, out_width, kernel_size, stride, places):
    """One plane of _pool_back, as a list of numbers.

    A row is cleared when the first window comes to it: a whole plane would have left the fastest cache by then.
    """
    height, out_height, cleared = len(in_grad) // width, len(out_grad) // out_width, 0
    for h in range(out_height):
        rows = h * stride + kernel_size if h + 1 < out_height else height
        _fill(in_grad[cleared * width:rows * width], 0.0)
        cleared = rows
        _add_at_maxima(in_grad, h * stride * width, stride, places, out_grad, argidx, h * out_width, out_width)


# ------------------------------------------------------------------------------------ fully connected loops

@inner(disjoint=True)
def _add_products(acc, length, x, r, w, a, b, c, d):
    """acc[p] += x[r + p] * w[a + p] for p < length; ASIDE further on with b in place of a, then with c, then with d.

    Memory hands out four rows that are read at once faster than one after the other.
    """
    r, a, b, c, d = np.uint64(r), np.uint64(a), np.uint64(b), np.uint64(c), np.uint64(d)
    B, C, D = np.uint64(ASIDE), np.uint64(2 * ASIDE), np.uint64(3 * ASIDE)
    for p in range(np.uint64(length)):
        acc[p] = acc[p] + x[r + p] * w[a + p]
        acc[p + B] = acc[p + B] + x[r + p] * w[b + p]
        acc[p + C] = acc[p + C] + x[r + p] * w[c + p]
        acc[p + D] = acc[p + D] + x[r + p] * w[d + p]


@inner(disjoint=True)
def _add(sums, numbers):
    """sums[p] += numbers[p], for all p of the sums."""
    for p in range(np.uint64(len(sums))):
        sums[p] = sums[p] + numbers[p]


@inner(disjoint=True)
def _add_four_rows(out, to, length, rows, q, r, s, t, a, b, c, d):
    """out[to + i] += a * rows[q + i] + b * rows[r + i] + c * rows[s + i] + d * rows[t + i] for i < length.

    A signed index may be negative and count from the end: the loop would look, and take one number at a time.
    """
    to, q, r, s, t = np.uint64(to), np.uint64(q), np.uint64(r), np.uint64(s), np.uint64(t)
    for i in range(np.uint64(length)):
        out[to + i] = out[to + i] + a * rows[q + i] + b * rows[r + i] + c * rows[s + i] + d * rows[t + i]


@inner(disjoint=True)
def _add_one_row(out, to, length, rows, r, a):
    """out[to + i] += a * rows[r + i]: what is left over when the rows are no multiple of four."""
    to, r = np.uint64(to), np.uint64(r)
    for i in range(np.uint64(length)):
        out[to + i] = out[to + i] + a * rows[r + i]


@inner
def _connect_rows(first, batch, features, rows, x, w, bias, y):
    """Outputs of _fully_connect from four rows of the weight, `first` on.  Past the last row, that one once more."""
    a, b, c, d = first, min(first + 1, rows - 1), min(first + 2, rows - 1), min(first + 3, rows - 1)
    acc = np.empty(np.int64(4 * ASIDE), dtype=y.dtype)
    for n in range(batch):
        _fill(acc, 0.0)
        for i in range(0, features, LANES):
            _add_products(acc, min(LANES, features - i), x, n * features + i, w, a * features + i, b * features + i,
                          c * features + i, d * features + i)
        for o in range(first, d + 1):
            sums, half = acc[(o - first) * ASIDE:], LANES // 2
            while half > 0:
                _add(sums[:half], sums[half:])
                half //= 2
            y[n * rows + o] = sums[0] + bias[o]


@kernel(parallel=True)
def _fully_connect(inputs, outputs, weight, bias):
    """outputs[n, o] = bias[o] + sum over i of weight[o, i] * inputs[n, i].

    LANES partial sums run side by side, as no processor adds fast to one number; in the end they are folded in
    halves.  Always the same sums in the same tree.  A job takes four rows of the weight.
    """
    batch, features = inputs.shape
    rows = outputs.shape[1]
    x, w, y = inputs.reshape(-1), weight.reshape(-1), outputs.reshape(-1)
    for job in prange((rows + 3) // 4):
        _connect_rows(np.int64(job) * 4, batch, features, rows, x, w, bias, y)


@inner
def _add_met_rows(numbers, in_features, first, last, out_grad, weights, rows):
    """The columns from `first` to `last` of _fully_connect_back, of the rows of the weight that are listed."""
    batch, whole = len(out_grad), len(rows) // 4 * 4
    for n in range(batch):
        _fill(numbers[n * in_features + first:n * in_features + last], 0.0)
    for r in range(0, whole, 4):
        a, b, c, d = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        for n in range(batch):
            _add_four_rows(numbers, n * in_features + first, last - first, weights,
                           a * in_features + first, b * in_features + first, c * in_features + first,
                           d * in_features + first, out_grad[n, a], out_grad[n, b], out_grad[n, c], out_grad[n, d])
    for r in range(whole, len(rows)):
        for n in range(batch):
            _add_one_row(numbers, n * in_features + first, last - first, weights, rows[r] * in_features + first,
                         out_grad[n, rows[r]])


@kernel(parallel=True)
def _fully_connect_back(out_grad, in_grad, weight, jobs):
    """in_grad[n, i] = sum over o of out_grad[n, o] * weight[o, i].

    A job owns some columns i of in_grad and walks down the rows of the weight, four at a time.  The fewer jobs, the
    longer the pieces of a row, and the faster memory hands them out.  Rows that meet nothing but zeros are not read:
    behind a ReLU that is a good part of them.
    """
    batch, out_features = out_grad.shape
    in_features = in_grad.shape[1]
    numbers, weights, width = in_grad.reshape(-1), weight.reshape(-1), (in_features + jobs - 1) // jobs
    rows, met = np.empty(out_features, dtype=np.int64), 0
    for o in range(out_features):
        zeros = True
        for n in range(batch):
            zeros = zeros and out_grad[n, o] == 0
        if not zeros:
            rows[met] = o
            met += 1
    rows = rows[:met]
    for index in prange(jobs):
        job = np.int64(index)
        _add_met_rows(numbers, in_features, min(in_features, job * width), min(in_features, job * width + width),
                      out_grad, weights, rows)


@kernel(parallel=True)
def _fully_connect_grad(out_grad, inputs, grad_weight, grad_bias):
    """grad_weight[o, i] = sum over n of out_grad[n, o] * inputs[n, i]; grad_bias[o] = sum of out_grad[n, o]."""
    batch, in_features = inputs.shape
    sums, x, whole = grad_weight.reshape(-1), inputs.reshape(-1), batch // 4 * 4
    for o in prange(out_grad.shape[1]):
        grad_bias[o] = 0
        for n in range(batch):
            grad_bias[o] += out_grad[n, o]
        _fill(grad_weight[o], 0.0)
        for n in range(0, whole, 4):
            _add_four_rows(sums, o * in_features, in_features, x, n * in_features, (n + 1) * in_features,
                           (n + 2) * in_features, (n + 3) * in_features,
                           out_grad[n, o], out_grad[n + 1, o], out_grad[n + 2, o], out_grad[n + 3, o])
        for n in range(whole, batch):
            _add_one_row(sums, o * in_features, in_features, x, n * in_features, out_grad[n, o])


@kernel(parallel=True)
def _descend(parameter, gradient, lr, out):
    """out = parameter - lr * gradient, number by number."""
    for p in prange(len(out)):
        out[p] = parameter[p] - lr * gradient[p]


# ------------------------------------------------------------------------------- element-by-element loops

@kernel(parallel=True)
def _relu(inputs, outputs, positive):
    """outputs = max(0, inputs); a NaN stays one.  positive notes where the gradient will pass."""
    for p in prange(len(inputs)):
        outputs[p] = 0 if inputs[p] <= 0 else inputs[p]
        positive[p] = inputs[p] > 0


@kernel(parallel=True)
def _relu_back(out_grad, in_grad, positive):
    """in_grad = out_grad where the input was positive, else 0."""
    for p in prange(len(out_grad)):
        in_grad[p] = out_grad[p] if positive[p] else 0


@kernel
def _flatten(inputs, outputs):
    """outputs[n, (c * H + h) * W + w] = inputs[n, c, h, w]."""
    batch, channels, height, width = inputs.shape
    for plane in range(batch * channels):
        n, c = plane // channels, plane % channels
        for h in range(height):
            for w in range(width):
                outputs[n, (c * height + h) * width + w] = inputs[n, c, h, w]


@kernel
def _unflatten(out_grad, in_grad):
    """in_grad[n, c, h, w] = out_grad[n, (c * H + h) * W + w]."""
    batch, channels, height, width = in_grad.shape
    for plane in range(batch * channels):
        n, c = plane // channels, plane % channels
        for h in range(height):
            for w in range(width):
                in_grad[n, c, h, w] = out_grad[n, (c * height + h) * width + w]


# ------------------------------------------------------------------------------------------------- checking

def _checked(array, name, ndim=None, shape=None):
    """The array as the loops want it, float32 or float64 and contiguous; ValueError or TypeError names it."""
    array = np.asarray(array)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError('%s: float32 or float64 numbers expected, got %s' % (name, array.dtype))
    if ndim is not None and array.ndim != ndim:
        raise ValueError('%s: %d dimensions expected, got shape %s' % (name, ndim, array.shape))
    if shape is not None and array.shape != shape:
        raise ValueError('%s: shape %s expected, got %s' % (name, shape, array.shape))
    return np.ascontiguousarray(array)


def _windows(length, kernel_size, stride, name):
    """How many windows of kernel_size fit into length, stride apart: floor((length - K) / S + 1)."""
    if length < kernel_size:
        raise ValueError('%s: the kernel of %d does not fit into %d' % (name, kernel_size, length))
    return (length - kernel_size) // stride + 1


def _at_least(least, **sizes):
    for name, size in sizes.items():
        if size != int(size) or size < least:
            raise ValueError('%s: a whole number of at least %d expected, got %r' % (name, least, size))


def _after_forward(state):
    """The state that forward left for backward; RuntimeError if there was no forward."""
    if state is None:
        raise RuntimeError('backward needs a forward first: it uses what forward saw')
    return state


class _Parameters(object):
    """A weight, drawn when it is first read, and a bias: what the two layers that learn have in common.

    A network that loads a checkpoint never reads its initial weights, so 134 million random numbers are
    not drawn in vain.
    """

    def __init__(self, weight_shape):
        self.weight_shape = weight_shape
        self.bias = np.zeros(weight_shape[:1])
        self._weight = None

    @property
    def weight(self):
        """ndarray: the weight; before it is set or loaded, drawn from N(0, 0.01**2) with numpy's global seed."""
        if self._weight is None:
            self._weight = np.random.normal(loc=0.0, scale=0.01, size=self.weight_shape)
        return self._weight

    @weight.setter
    def weight(self, weight):
        self._weight = weight

    def load_params(self, weight, bias):
        """Take weight and bias as they are, without copying; AssertionError if a shape does not fit."""
        assert self.weight_shape == weight.shape, 'weight: %s expected, got %s' % (self.weight_shape, weight.shape)
        assert self.bias.shape == bias.shape, 'bias: %s expected, got %s' % (self.bias.shape, bias.shape)
        self.weight = weight
        self.bias = bias

    def _typed(self, dtype):
        """Weight and bias, contiguous and of the dtype that a forward pass computes in."""
        return (np.ascontiguousarray(self.weight, dtype=dtype), np.ascontiguousarray(self.bias, dtype=dtype))


# ------------------------------------------------------------------------------------------------ the layers

class ConvolutionLayer(_Parameters):
    """Convolution of planes, handbook 2.2.1.1 and 2.5.2.1.

    Y(n, c, h, w) = Bias(c) + sum over k, i, j of Weight(c, k, i, j) * X_pad(n, k, h * S + i, w * S + j)

    Parameters
    ----------
    in_channels, out_channels : int
        Planes read, C_in, and planes written, C_out.
    kernel_size : int
        Side K of the square window.
    padding : int
        Rows and columns of zeros P around each plane.
    stride : int
        Step S of the window.

    Attributes
    ----------
    weight : ndarray (C_out, C_in, K, K)
    bias : ndarray (C_out,)
    input_shape : tuple
        Shape of the last input, for backward.

    Examples
    --------
    >>> layer = ConvolutionLayer(in_channels=1, out_channels=1, kernel_size=2)
    >>> layer.load_params(np.array([[[[1., 0.], [0., 10.]]]]), np.array([100.]))
    >>> layer.forward(np.array([[[[1., 2., 3.], [4., 5., 6.]]]]))
    array([[[[151., 162.]]]])
    >>> layer.backward(np.array([[[[1., 2.]]]]))
    array([[[[ 1.,  2.,  0.],
             [ 0., 10., 20.]]]])
    """

    def __init__(self, in_channels, out_channels, kernel_size, padding=0, stride=1):
        _at_least(1, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride)
        _at_least(0, padding=padding)
        super().__init__((out_channels, in_channels, kernel_size, kernel_size))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.padding = padding
        self.stride = stride
        self.input_shape = None
        self.output_shape = None

    def forward(self, inputs):
        """Convolve.

        Parameters
        ----------
        inputs : ndarray (N, C_in, H, W), float32 or float64

        Returns
        -------
        ndarray (N, C_out, H_out, W_out), dtype of inputs
            H_out = floor((H + 2P - K) / S + 1), W_out alike.

        Raises
        ------
        TypeError, ValueError
            For other numbers than float32 and float64, and for shapes that do not fit; the argument is named.
        """
        inputs = _checked(inputs, 'inputs', ndim=4)
        batch, channels, height, width = inputs.shape
        if channels != self.in_channels:
            raise ValueError('inputs: %d channels expected, got shape %s' % (self.in_channels, inputs.shape))
        out_height = _windows(height + 2 * self.padding, self.kernel_size, self.stride, 'inputs')
        out_width = _windows(width + 2 * self.padding, self.kernel_size, self.stride, 'inputs')
        self.input_shape = inputs.shape
        self.output_shape = (batch, self.out_channels, out_height, out_width)

        outputs = np.empty(self.output_shape, dtype=inputs.dtype)
        weight, bias = self._typed(inputs.dtype)
        return _outputs_of_inputs(inputs, outputs, weight, bias, self.kernel_size, self.stride, self.padding)

    def backward(self, out_grad):
        """Gradient of the inputs.

        Parameters
        ----------
        out_grad : ndarray (N, C_out, H_out, W_out), float32 or float64
            Gradient of the loss with respect to the output of the last forward.

        Returns
        -------
        ndarray (N, C_in, H, W), float64

        Raises
        ------
        RuntimeError
            Before any forward.
        TypeError, ValueError
            As for forward.
        """
        batch, channels, height, width = _after_forward(self.input_shape)
        out_grad = _checked(out_grad, 'out_grad', shape=self.output_shape)
        in_grad = np.empty((batch, channels, height, width))
        out_grad = out_grad.astype(in_grad.dtype, copy=False)
        weight = np.ascontiguousarray(self.weight)
        if _winograd_goes_back(out_grad, in_grad, self.kernel_size, self.stride):    # the other one is not compiled
            return _gradient_by_winograd(out_grad, in_grad, weight, self.padding)
        return _gradient_of_inputs(out_grad, in_grad, weight, self.kernel_size, self.stride, self.padding)

    @staticmethod
    @kernel
    def _conv(inputs_pad, outputs, weight, bias, kernel_size, stride):
        """Fill outputs with the convolution of inputs_pad and return them.

        forward calls _outputs_of_inputs itself: Winograd's way needs no copy of the inputs in their frame.
        """
        return _outputs_of_inputs(inputs_pad, outputs, weight, bias, kernel_size, stride, np.int64(0))

    @staticmethod
    @kernel
    def _conv_back(out_grad, in_grad, weight, kernel_size, stride):
        """Add the gradient of the padded inputs to in_grad and return it.

        backward calls _gradient_of_inputs itself: the frame, which it would cut off, is a third of a 14x14 plane.
        """
        batch, in_channels, height, width = in_grad.shape
        more = np.empty(in_grad.shape, dtype=in_grad.dtype)
        _gradient_of_inputs(out_grad.astype(in_grad.dtype), more, weight, kernel_size, stride, np.int64(0))
        for n in range(batch):
            for k in range(in_channels):
                for h in range(height):
                    for w in range(width):
                        in_grad[n, k, h, w] += more[n, k, h, w]
        return in_grad


class MaxPoolLayer(object):
    """The largest number in each window, handbook 2.2.1.2 and 2.5.2.2.

    Y(n, c, h, w) = max over i, j < K of X(n, c, h * S + i, w * S + j)

    Parameters
    ----------
    kernel_size, stride : int
        Side K and step S of the square window.

    Attributes
    ----------
    argidx : ndarray (N, C, H_out, W_out), int32
        Where in its window each output was found: i * K + j, the first in row-major order among equals.
    input_shape, output_shape : tuple
        Of the last forward, for backward.

    Examples
    --------
    >>> layer = MaxPoolLayer(kernel_size=2, stride=2)
    >>> layer.forward(np.array([[[[1., 5., 2., 0.], [3., 4., 9., 1.]]]]))
    array([[[[5., 9.]]]])
    >>> layer.argidx
    array([[[[1, 2]]]], dtype=int32)
    >>> layer.backward(np.array([[[[7., 8.]]]]))
    array([[[[0., 7., 0., 0.],
             [0., 0., 8., 0.]]]])
    """

    def __init__(self, kernel_size=2, stride=2):
        _at_least(1, kernel_size=kernel_size, stride=stride)
        self.kernel_size = kernel_size
        self.stride = stride
        self.argidx = None
        self.input_shape = None
        self.output_shape = None

    def forward(self, inputs):
        """Pool.

        Parameters
        ----------
        inputs : ndarray (N, C, H, W), float32 or float64

        Returns
        -------
        ndarray (N, C, H_out, W_out), dtype of inputs
            H_out = floor((H - K) / S + 1), W_out alike.

        Raises
        ------
        TypeError, ValueError
            For other numbers than float32 and float64, and for shapes that do not fit; the argument is named.
        """
        inputs = _checked(inputs, 'inputs', ndim=4)
        batch, channels, height, width = inputs.shape
        self.output_shape = (batch, channels, _windows(height, self.kernel_size, self.stride, 'inputs'),
                             _windows(width, self.kernel_size, self.stride, 'inputs'))
        self.input_shape = inputs.shape
        outputs = np.empty(self.output_shape, dtype=inputs.dtype)
        argidx = np.empty(self.output_shape, dtype=np.int32)
        outputs, self.argidx = self._pool(outputs, inputs, argidx, self.kernel_size, self.stride)
        return outputs

    def backward(self, out_grad):
        """Gradient of the inputs.

        Parameters
        ----------
        out_grad : ndarray (N, C, H_out, W_out), float32 or float64

        Returns
        -------
        ndarray (N, C, H, W), float64
            Where windows overlap, gradients add up.

        Raises
        ------
        RuntimeError
            Before any forward.
        TypeError, ValueError
            As for forward.
        """
        in_grad = np.empty(_after_forward(self.input_shape))    # _pool_back clears it
        out_grad = _checked(out_grad, 'out_grad', shape=self.output_shape)
        return self._pool_back(out_grad, in_grad, self.argidx, self.kernel_size, self.stride)

    @staticmethod
    @kernel(parallel=True)
    def _pool(outputs, inputs, argidx, kernel_size, stride):
        """Fill outputs and argidx and return both."""
        batch, channels, out_height, out_width = outputs.shape
        height, width = inputs.shape[2:]
        y, x, indices = outputs.reshape(-1), np.ascontiguousarray(inputs).reshape(-1), argidx.reshape(-1)
        outs, size = out_height * out_width, height * width
        for index in prange(batch * channels):
            plane = np.int64(index)
            _pool_plane(y[plane * outs:(plane + 1) * outs], x[plane * size:(plane + 1) * size],
                        indices[plane * outs:(plane + 1) * outs], width, out_width, kernel_size, stride)
        return outputs, argidx

    @staticmethod
    @kernel(parallel=True)
    def _pool_back(out_grad, in_grad, argidx, kernel_size, stride):
        """Fill in_grad: each gradient is added where its maximum was found, and the rest is 0.  Return it.

        Windows overlap when S < K, and then a pixel may be the maximum of several: a plane is one thread's.  Where an
        index leads to is worked out once for all windows, not by a division in each.
        """
        batch, channels, out_height, out_width = out_grad.shape
        height, width = in_grad.shape[2:]
        g, x, indices = out_grad.reshape(-1), in_grad.reshape(-1), argidx.reshape(-1)
        places = np.empty(kernel_size * kernel_size, dtype=np.int64)    # of a window's numbers, from its first on
        for i in range(kernel_size):
            for j in range(kernel_size):
                places[i * kernel_size + j] = i * width + j
        outs, size = out_height * out_width, height * width
        for index in prange(batch * channels):
            plane = np.int64(index)
            _pool_back_plane(g[plane * outs:(plane + 1) * outs], x[plane * size:(plane + 1) * size],
                             indices[plane * outs:(plane + 1) * outs], width, out_width, kernel_size, stride, places)
        return in_grad


class ReluLayer(object):
    """Y = max(0, X), number by number, for any shape; handbook 2.2.1, lab 1.  The gradient at exactly 0 is 0.

    Attributes
    ----------
    positive : ndarray, bool
        Where the last inputs were larger than 0.

    Examples
    --------
    >>> layer = ReluLayer()
    >>> layer.forward(np.array([-1., 0., 2.]))
    array([0., 0., 2.])
    >>> layer.backward(np.array([5., 6., 7.]))
    array([0., 0., 7.])
    """

    def __init__(self):
        self.positive = None

    def forward(self, inputs):
        """The positive numbers, and 0 for the others.

        Parameters
        ----------
        inputs : ndarray, float32 or float64
            Of any shape; NaN stays NaN.

        Returns
        -------
        ndarray
            Shape and dtype of inputs.

        Raises
        ------
        TypeError
            For other numbers than float32 and float64.
        """
        inputs = _checked(inputs, 'inputs')
        outputs = np.empty_like(inputs)
        self.positive = np.empty(inputs.shape, dtype=np.bool_)
        _relu(inputs.reshape(-1), outputs.reshape(-1), self.positive.reshape(-1))
        return outputs

    def backward(self, out_grad):
        """Gradient of the inputs.

        Parameters
        ----------
        out_grad : ndarray, float32 or float64
            Of the shape of the last inputs.

        Returns
        -------
        ndarray
            Shape and dtype of out_grad.

        Raises
        ------
        RuntimeError
            Before any forward.
        TypeError, ValueError
            For other numbers, or another shape.
        """
        out_grad = _checked(out_grad, 'out_grad', shape=_after_forward(self.positive).shape)
        in_grad = np.empty_like(out_grad)
        _relu_back(out_grad.reshape(-1), in_grad.reshape(-1), self.positive.reshape(-1))
        return in_grad


class FlattenLayer(object):
    """Pictures to rows of numbers and back, handbook 2.2.1.3 and 2.5.2.3.

    Y(n, (c * H + h) * W + w) = X(n, c, h, w)

    Attributes
    ----------
    input_shape : tuple
        Shape of the last inputs, for backward.

    Examples
    --------
    >>> FlattenLayer().forward(np.array([[[[1., 2.]], [[3., 4.]]]]))
    array([[1., 2., 3., 4.]])
    """

    def __init__(self):
        self.input_shape = None

    def forward(self, inputs):
        """Flatten.

        Parameters
        ----------
        inputs : ndarray (N, C, H, W), float32 or float64

        Returns
        -------
        ndarray (N, C * H * W), dtype of inputs
            A new array.

        Raises
        ------
        TypeError, ValueError
            For other numbers, or another number of dimensions.
        """
        inputs = _checked(inputs, 'inputs', ndim=4)
        self.input_shape = inputs.shape
        batch, channels, height, width = inputs.shape
        outputs = np.empty((batch, channels * height * width), dtype=inputs.dtype)
        _flatten(inputs, outputs)
        return outputs

    def backward(self, out_grad):
        """Gradient of the inputs.

        Parameters
        ----------
        out_grad : ndarray (N, C * H * W), float32 or float64

        Returns
        -------
        ndarray (N, C, H, W), dtype of out_grad
            A new array.

        Raises
        ------
        RuntimeError
            Before any forward.
        TypeError, ValueError
            For other numbers, or another shape.
        """
        batch, channels, height, width = _after_forward(self.input_shape)
        out_grad = _checked(out_grad, 'out_grad', shape=(batch, channels * height * width))
        in_grad = np.empty(self.input_shape, dtype=out_grad.dtype)
        _unflatten(out_grad, in_grad)
        return in_grad


class FullyConnectLayer(_Parameters):
    """Y = X Weight^T + Bias, lab 1.

    Y(n, o) = Bias(o) + sum over i of Weight(o, i) * X(n, i)

    Parameters
    ----------
    in_features, out_features : int

    Attributes
    ----------
    weight : ndarray (out_features, in_features)
    bias : ndarray (out_features,)
    grad_weight, grad_bias : ndarray
        Gradients of weight and bias for the last backward.  They are computed when they are read: a pass back
        to the picture alone does not need 100 million of them.

    Examples
    --------
    >>> layer = FullyConnectLayer(in_features=2, out_features=1)
    >>> layer.load_params(np.array([[1., 10.]]), np.array([100.]))
    >>> layer.forward(np.array([[2., 3.]]))
    array([[132.]])
    >>> layer.backward(np.array([[1.]]))
    array([[ 1., 10.]])
    >>> layer.grad_weight
    array([[2., 3.]])
    """

    def __init__(self, in_features, out_features):
        _at_least(1, in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features))
        self.in_features = in_features
        self.out_features = out_features
        self.inputs = None
        self.out_grad = None
        self._gradients = None

    def forward(self, inputs):
        """Connect.

        Parameters
        ----------
        inputs : ndarray (N, in_features), float32 or float64

        Returns
        -------
        ndarray (N, out_features), dtype of inputs

        Raises
        ------
        TypeError, ValueError
            For other numbers than float32 and float64, and for shapes that do not fit; the argument is named.
        """
        inputs = _checked(inputs, 'inputs', ndim=2)
        if inputs.shape[1] != self.in_features:
            raise ValueError('inputs: %d features expected, got shape %s' % (self.in_features, inputs.shape))
        self.inputs = inputs
        outputs = np.empty((len(inputs), self.out_features), dtype=inputs.dtype)
        _fully_connect(inputs, outputs, *self._typed(inputs.dtype))
        return outputs

    def backward(self, out_grad):
        """Gradient of the inputs.

        Parameters
        ----------
        out_grad : ndarray (N, out_features), float32 or float64

        Returns
        -------
        ndarray (N, in_features), dtype of out_grad

        Raises
        ------
        RuntimeError
            Before any forward.
        TypeError, ValueError
            As for forward.
        """
        batch = len(_after_forward(self.inputs))
        self.out_grad = _checked(out_grad, 'out_grad', shape=(batch, self.out_features))
        self._gradients = None
        in_grad = np.empty((batch, self.in_features), dtype=self.out_grad.dtype)
        jobs = get_num_threads() * (self.in_features // (get_num_threads() * COLUMNS) + 1)    # as many for each thread
        _fully_connect_back(self.out_grad, in_grad, np.ascontiguousarray(self.weight), jobs)
        return in_grad

    def _parameter_gradients(self):
        if self._gradients is None:
            out_grad = _after_forward(self.out_grad)
            grad_weight = np.empty(self.weight_shape, dtype=out_grad.dtype)
            grad_bias = np.empty(self.out_features, dtype=out_grad.dtype)
            _fully_connect_grad(out_grad, self.inputs.astype(out_grad.dtype, copy=False), grad_weight, grad_bias)
            self._gradients = grad_weight, grad_bias
        return self._gradients

    @property
    def grad_weight(self):
        """ndarray (out_features, in_features): sum over n of out_grad(n, o) * X(n, i)."""
        return self._parameter_gradients()[0]

    @property
    def grad_bias(self):
        """ndarray (out_features,): sum over n of out_grad(n, o)."""
        return self._parameter_gradients()[1]

    def update_params(self, lr):
        """One step of gradient descent, into new arrays: weight - lr * grad_weight, bias - lr * grad_bias.

        Parameters
        ----------
        lr : float
            Learning rate.
        """
        for name, gradient in (('weight', self.grad_weight), ('bias', self.grad_bias)):
            old = np.ascontiguousarray(getattr(self, name))
            new = np.empty_like(old)
            _descend(old.reshape(-1), gradient.reshape(-1), lr, new.reshape(-1))
            setattr(self, name, new)
