"""Draw file/tulips_demo.jpg, a bed of tulips: a small renderer in numpy and OpenCV.  No photograph goes into it.

Petals, leaves and stems are curved sheets, sampled so densely that every sample is one dot.  A sun and four patches of
sky light the dots, each with a map of what stands in its way, and of the dots in one place the nearest is seen.
Plants at one distance make one layer; layers are blurred as a lens blurs things at that distance and laid over each
other from far to near.  All of it happens in linear light, four times as large as the picture.

    python file/making/draw_tulips.py OUT.jpg
"""
import argparse
import os
import sys

import cv2
import numpy as np

from expand import exit_if_there

WIDTH, HEIGHT, SUPER = 320, 240, 4           # the picture, and how many times larger it is drawn
FOCAL, HORIZON = 720 * SUPER, 66 * SUPER     # lengths in the picture are pixels, those in the garden centimetres
EYE = np.array([0, 44, 0])                   # the camera looks along z
FOCUS, APERTURE = 72, 800 * SUPER
SHADOWS_TO = 130                             # tulips farther away are too blurred for shadows to matter
CELL = 0.12                                  # of the lights' maps
LIGHTS = [                                   # direction towards the light, its colour, how soft its shadows are
    ((-0.84, 0.52, 0.00), (3.60, 3.20, 2.50), 1),
    ((0.50, 0.42, 0.76), (0.55, 0.56, 0.50), 3),
    ((0.10, 0.90, -0.50), (0.32, 0.37, 0.44), 6),
    ((-0.70, 0.30, -0.60), (0.22, 0.23, 0.24), 6),
    ((0.00, 0.15, -1.00), (0.15, 0.16, 0.15), 6)]

# colours in linear RGB: the middle, the edge and the foot of a petal
KINDS = {
    'red': ((0.58, 0.008, 0.014), (0.86, 0.085, 0.045), (0.75, 0.42, 0.05)),
    'pink': ((0.78, 0.11, 0.27), (0.95, 0.52, 0.60), (0.93, 0.85, 0.70)),
    'yellow': ((0.90, 0.48, 0.010), (0.98, 0.74, 0.10), (0.62, 0.62, 0.08)),
    'purple': ((0.20, 0.014, 0.25), (0.44, 0.10, 0.50), (0.50, 0.40, 0.50)),
    'orange': ((0.74, 0.050, 0.008), (0.97, 0.56, 0.03), (0.85, 0.60, 0.05)),
    'white': ((0.90, 0.86, 0.70), (0.95, 0.93, 0.86), (0.62, 0.72, 0.35))}
ROWS = ((96, 'pink'), (112, 'red'), (132, 'yellow'), (158, 'purple'), (190, 'red'), (230, 'pink'), (280, 'yellow'),
        (345, 'orange'), (430, 'red'))       # distance and prevailing kind
# tulips placed by hand: seed, x, z, height, size of the flower, kind, how far it opens, how far the stem leans
NEAR = [
    (21, -7.6, 72, 47.0, 7.0, 'red', 0.06, -1.4), (12, 2.0, 70, 44.5, 7.2, 'pink', 0.13, 0.8),
    (23, 10.8, 74, 47.5, 6.8, 'yellow', 0.04, 2.0), (14, -13.6, 78, 43.0, 6.4, 'purple', 0.05, -1.8),
    (15, 6.5, 82, 47.5, 6.5, 'purple', 0.02, 0.6), (16, -2.6, 84, 46.0, 6.6, 'orange', 0.06, -0.5),
    (17, 16.0, 80, 42.0, 6.5, 'red', 0.05, 1.2), (18, -5.5, 88, 40.5, 6.4, 'white', 0.16, -1.0),
    (19, 9.5, 90, 40.0, 6.2, 'orange', 0.08, 0.5), (20, -9.6, 50, 36.5, 6.6, 'pink', 0.08, -0.5)]


def unit(vectors):
    """Vectors scaled to length one along the last axis."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def mix(a, b, t):
    """From a to b as t, given for each sample, goes from 0 to 1."""
    a, b = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    return a + (b - a) * np.clip(t, 0, 1)[..., None]


def bezier(control, t):
    """Points of the cubic Bezier curve with four control points, for every t."""
    a, b, c, d = np.asarray(control, dtype=np.float32)
    t = t[..., None]
    return (1 - t)**3 * a + 3 * t * (1 - t)**2 * b + 3 * t**2 * (1 - t) * c + t**3 * d


def noise(rng, rows, columns, shape):
    """Smooth noise between about -1 and 1 with that many bumps either way, alike at every sampling."""
    bumps = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return cv2.resize(bumps, shape[::-1], interpolation=cv2.INTER_CUBIC)


def grid(length, width, step):
    """Coordinates along (0 to 1) and across (-1 to 1) a sheet with a sample every step."""
    return np.meshgrid(np.linspace(0, 1, max(8, int(length / step)), dtype=np.float32),
                       np.linspace(-1, 1, max(6, int(width / step)), dtype=np.float32), indexing='ij')


def petal(rng, frame, size, lean, turn, outer, kind, step):
    """One petal: a pointed sheet wrapped round the flower's axis, r away from it, y above its foot."""
    t, s = grid(1.35 * size, 0.95 * size, step)
    middle, edge, foot = KINDS[kind]
    r, y = np.moveaxis(bezier([(0.03, 0), (0.44, -0.03), (0.42, 0.70), (0.17 + lean, 1.0)], t), -1, 0)
    rise = np.sqrt(1 - (np.maximum(0.55 - t, 0) / 0.58)**2)
    taper = np.maximum(np.cos(np.pi / 2 * (np.maximum(t - 0.55, 0) / 0.45)**1.1), 0)**0.9
    veins = 0.6 * noise(rng, 3, 60, t.shape) + 0.4 * noise(rng, 5, 22, t.shape)
    r += 0.025 * outer + t * (0.002 * veins - 0.012 * np.exp(-(s / 0.10)**2) + 0.010 * noise(rng, 3, 6, t.shape))
    r += (0.03 * noise(rng, 4, 3, t.shape) - 0.02 + 0.05 * outer) * np.abs(s)**3 * t + 0.10 * lean * t**6
    y += 0.02 * noise(rng, 3, 3, t.shape) * t
    angle = turn + 0.37 * s * rise * taper / np.maximum(r, 0.16)
    points = size * np.stack([r * np.sin(angle), y, r * np.cos(angle)], axis=-1) @ frame[:3] + frame[3]
    colour = mix(middle, edge, 0.8 * np.abs(s)**6 + 0.35 * t**4 + 0.16 * veins)
    colour = mix(colour, foot, 1.1 - t / 0.22 + 0.2 * veins) * (1 + 0.12 * veins[..., None])
    return points, colour, 0.75, 0.085


def leaf(rng, base, length, width, azimuth, bend, step):
    """One leaf: a long folded blade that rises steeply and bends over."""
    t, s = grid(length, width, step)
    line = t[:, 0]
    slope = 1.5 - bend * line**1.6
    twist = azimuth + rng.uniform(-0.9, 0.9) * line**2
    half = width / 2 * np.maximum(np.sin(np.pi * (0.04 + 0.96 * line)**0.75), 0)**0.8
    ahead, up = np.array([np.cos(azimuth), 0, np.sin(azimuth)]), np.array([0, 1, 0])
    along = np.cos(slope)[:, None] * ahead + np.sin(slope)[:, None] * up
    inward = np.cos(slope)[:, None] * up - np.sin(slope)[:, None] * ahead
    across = np.stack([-np.sin(twist), 0 * line, np.cos(twist)], axis=-1)
    fold = 0.45 * np.abs(s)**1.5 * (1.1 - t) + 0.14 * noise(rng, 6, 3, t.shape) * s**2
    points = (base + np.cumsum(along, axis=0) * length / len(line))[:, None] + half[:, None, None] * (
        s[..., None] * across[:, None] + fold[..., None] * inward[:, None])
    veins = noise(rng, 2, 34, t.shape)
    colour = mix((0.026, 0.12, 0.04), (0.06, 0.20, 0.055), 0.5 + 0.5 * noise(rng, 5, 3, t.shape) + 0.3 * veins)
    colour = mix(colour, (0.20, 0.32, 0.10), 0.6 * np.abs(s)**9 + 0.35 * t**5) * (1 + 0.10 * veins[..., None])
    return points, colour, 0.6, 0.10


def plant(tulip, step):
    """The sheets of one tulip, each as points (n, m, 3), colours, translucency and gloss."""
    seed, x, z, height, size, kind, lean, tilt = tulip
    rng = np.random.RandomState(seed)
    base = np.array([x, 0, z])
    top = base + (tilt, height - size, rng.uniform(-1.5, 0.5))
    control = np.array([base, base + (-0.3 * tilt, 0.4 * height, 0), top - (0.55 * tilt, 0.3 * height, 0), top])
    axis = unit(control[3] - control[2])
    side = unit(np.cross(axis, (0, 0, 1)))
    back = np.cross(side, axis)
    turn = 2 / 3 * np.pi + rng.uniform(-0.6, 0.6)                  # the second petal faces the camera, more or less
    for k in range(6):
        yield petal(rng, np.array([side, axis, back, top]), size * (1 if k % 2 else 0.97),
                    lean + rng.uniform(-0.05, 0.05), turn + k * np.pi / 3 + rng.uniform(-0.1, 0.1), k % 2, kind, step)
    t, s = grid(height, 1.2, step)
    radius = 0.25 + 0.12 * (1 - t) + 0.2 * np.maximum(t - 0.98, 0) / 0.02
    ring = np.sin(np.pi * s)[..., None] * side - np.cos(np.pi * s)[..., None] * back
    yield bezier(control, t) + radius[..., None] * ring, mix((0.07, 0.17, 0.04), (0.17, 0.29, 0.09), t), 0.1, 0.15
    for k in range(3):
        yield leaf(rng, base + (0, 2.5 * k, 0), height * rng.uniform(0.72, 0.98) - 3 * k, rng.uniform(4.0, 6.2),
                   rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 1.3), step)


def splat(dots, nearest, picture=None, colour=None):
    """Put dots (..., [column, row, depth]) into a depth buffer and a picture where nothing nearer is."""
    column, row = dots[..., 0].ravel().astype(np.int32), dots[..., 1].ravel().astype(np.int32)
    depth, place = dots[..., 2].ravel(), row * nearest.shape[1] + column
    seen = (column >= 0) & (column < nearest.shape[1]) & (row >= 0) & (row < nearest.shape[0])
    seen[seen] = depth[seen] < nearest.ravel()[place[seen]]
    order = np.flatnonzero(seen)
    order = order[np.argsort(-depth[order], kind='stable')]        # where several dots meet, the last one stays
    nearest.reshape(-1)[place[order]] = depth[order]
    if picture is not None:
        picture.reshape(-1, 3)[place[order]] = colour.reshape(-1, 3)[order]


class Light(object):
    """A distant light, and how near to it the first thing in its way is."""

    def __init__(self, direction, colour, soft):
        self.direction, self.colour, self.soft = unit(np.array(direction)), np.array(colour), soft
        side = unit(np.cross(self.direction, (0.1, 0, 1)))
        self.axes = np.stack([side, np.cross(self.direction, side), -self.direction], axis=-1)
        self.nearest = np.full((1200, 1200), np.inf, dtype=np.float32)

    def place(self, points):
        """Column, row and depth of points in the light's map."""
        return (points - (0, 30, 90)) @ self.axes / (CELL, CELL, 1) + (600, 600, 0)

    def reach(self, points):
        """The share of the light that arrives, averaged over places nearby."""
        place = self.place(points)
        column, row = np.moveaxis(np.clip(place[..., :2], 10, 1189).astype(np.int32), -1, 0)
        passed = 0
        for k in range(12):
            dx, dy = (int(round(self.soft * np.sqrt(k / 6) * turn)) for turn in (np.cos(2.4 * k), np.sin(2.4 * k)))
            passed = passed + (place[..., 2] < self.nearest[row + dy, column + dx] + 0.18 + 0.03 * self.soft)
        return passed / 12


def shade(points, albedo, thin, gloss, lights):
    """Colour of the samples of a sheet as the camera sees them."""
    normal = unit(np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1)))
    view = unit(EYE - points)
    normal *= np.sign(np.sum(normal * view, axis=-1, keepdims=True))
    through = thin * albedo**1.5                                   # what shines through is deeper in colour
    total = 0.035 * albedo
    for light in lights:
        cosine = (normal @ light.direction)[..., None]
        shine = gloss * np.maximum(np.sum(normal * unit(view + light.direction), axis=-1), 0)[..., None]**12
        lit = 1 - (1 - 0.25 * (thin > 0.5)) * (1 - light.reach(points + 0.15 * normal)[..., None])
        total = total + light.colour * lit * np.where(cosine > 0, albedo * cosine + shine, -through * cosine)
    return total * np.clip((points[..., 1:2] - 4) / 32, 0.08, 1)**1.3  # deep between the leaves it is dark


def disc(picture, radius):
    """Blur as a lens out of focus does: every dot becomes a disc."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach:reach + 1, -reach:reach + 1]
    kernel = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    return cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)


def backdrop(rng):
    """Trees far away, with the sun between their leaves, above the dark of the bed."""
    shape = HEIGHT * SUPER, WIDTH * SUPER
    y, x = np.mgrid[0:1:shape[0] * 1j, 0:1:shape[1] * 1j]
    foliage = noise(rng, 9, 12, shape) + 0.6 * noise(rng, 20, 26, shape)
    picture = mix((0.02, 0.06, 0.025), (0.12, 0.22, 0.03), 0.36 + 0.4 * foliage - 0.4 * x)
    for _ in range(90):
        place = int(rng.beta(1.2, 2.0) * shape[1]), int(rng.beta(1, 2.6) * 0.5 * shape[0])
        light = np.array(((1.0, 0.90, 0.40), (0.45, 0.75, 0.15), (0.75, 0.90, 0.65))[rng.randint(3)])
        cv2.circle(picture, place, int(rng.uniform(2, 4) * SUPER), (4 * rng.gamma(0.9) * light).tolist(), -1)
    return mix(disc(picture, 12 * SUPER), (0.012, 0.03, 0.012), (y - 0.42) / 0.2).astype(np.float32)


def bed(rng):
    """All tulips, the farthest first."""
    tulips = list(NEAR)
    for z, kind in ROWS:
        for x in np.arange(-0.24 * z, 0.24 * z, 6.2 + 0.006 * z):
            tulips.append((rng.randint(10**6), x + rng.uniform(-2, 2), z + rng.uniform(-3, 3), rng.uniform(37, 43),
                           rng.uniform(5.8, 6.8), kind if rng.uniform() < 0.8 else sorted(KINDS)[rng.randint(6)],
                           rng.uniform(0, 0.12), rng.uniform(-2, 2)))
    return sorted(tulips, key=lambda tulip: -tulip[2])


def photograph(tulips, lights, z):
    """Colour and coverage, (H, W, 4), of tulips about z away."""
    nearest = np.full((HEIGHT * SUPER, WIDTH * SUPER), np.inf, dtype=np.float32)
    picture = np.zeros(nearest.shape + (3,), dtype=np.float32)
    rise = np.array([0, 0.035 * max(z - 75, 0), 0])                # of the ground, so that the rows behind are seen
    for tulip in tulips:
        for points, albedo, thin, gloss in plant(tulip, 2.2 * z / FOCAL):
            dots = points + rise - EYE
            dots[..., :2] = (WIDTH * SUPER / 2, HORIZON) + dots[..., :2] * (1, -1) * FOCAL / dots[..., 2:]
            gaps = [np.abs(np.diff(dots[..., :2], axis=axis)).max() for axis in (1, 0)]
            size = tuple(int(count * max(gap / 0.8, 1)) + 1 for count, gap in zip(dots.shape[1::-1], gaps))
            colour = cv2.resize(shade(points, albedo, thin, gloss, lights), size)
            splat(cv2.resize(dots, size), nearest, picture, colour)    # no gaps: less than a pixel between dots
    return np.dstack([picture, np.isfinite(nearest)]).astype(np.float32)


def develop(picture, rng):
    """Shrink, then do what a camera does: glow round lights, vignette, tone curve, sharpening, grain."""
    picture = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    picture = picture + 0.07 * (cv2.GaussianBlur(picture, (0, 0), 9) - picture)
    y, x = np.mgrid[-1:1:HEIGHT * 1j, -1:1:WIDTH * 1j]
    picture = 1 - np.exp(-picture * (1 - 0.14 * (x**2 + y**2))[..., None])
    picture = np.clip(picture + 0.12 * (picture - picture.mean(axis=2, keepdims=True)), 0, 1)**(1 / 2.2)
    picture = 255 * (0.5 * picture + 0.5 * picture**2 * (3 - 2 * picture))
    picture = picture + 0.35 * (picture - cv2.GaussianBlur(picture, (0, 0), 0.8))
    grain = cv2.GaussianBlur(rng.normal(0, 1, (HEIGHT, WIDTH)), (0, 0), 0.6)
    return np.clip(picture + 2.6 * grain[..., None] + 0.5, 0, 255).astype(np.uint8)


def draw():
    """The picture: ndarray (HEIGHT, WIDTH, 3), uint8, RGB."""
    rng = np.random.RandomState(5)
    picture, tulips, lights = backdrop(rng), bed(rng), [Light(*light) for light in LIGHTS]
    for tulip in (tulip for tulip in tulips if tulip[2] < SHADOWS_TO):
        for points, _, _, _ in plant(tulip, 0.7 * CELL):
            for light in lights:
                splat(light.place(points), light.nearest)
    while tulips:
        z = tulips[0][2]
        layer = [tulip for tulip in tulips if tulip[2] > 0.97 * z]
        tulips = tulips[len(layer):]
        print('%3.0f cm away: %d tulips' % (z, len(layer)), file=sys.stderr)
        layer = disc(photograph(layer, lights, z), APERTURE * abs(1 / z - 1 / FOCUS))
        picture = picture * (1 - layer[..., 3:]) + layer[..., :3]
    return develop(picture, rng)


def encode(picture):
    """The bytes of a JPEG file, quality 95, colour as finely sampled as brightness (4:4:4)."""
    factor = getattr(cv2, 'IMWRITE_JPEG_SAMPLING_FACTOR', 7), 0x111111
    data = cv2.imencode('.jpg', picture[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 95) + factor)[1].tobytes()
    if data[data.index(b'\xff\xc0') + 11] != 0x11:                 # the frame header's sampling of the brightness
        sys.exit('draw_tulips.py: OpenCV %s cannot write JPEG in 4:4:4; run this with a newer one '
                 '(pip install --upgrade opencv-python)' % cv2.__version__)
    return data


def main():
    """Read the arguments, draw, write."""
    parser = argparse.ArgumentParser(description='Draw a bed of tulips, 320x240 (about half a minute).')
    parser.add_argument('out', metavar='OUT.jpg', help='where to write it, a new file')
    out = parser.parse_args().out
    exit_if_there('draw_tulips.py', out)
    encode(np.zeros((16, 16, 3), dtype=np.uint8))                  # fail before the work, not after it
    part = out + '.part'
    try:
        with open(part, 'wb') as file:
            file.write(encode(draw()))
        os.replace(part, out)
    except OSError as error:
        sys.exit('draw_tulips.py: cannot write %s: %s; name another file' % (out, error.strerror))
    finally:
        if os.path.exists(part):
            os.remove(part)


if __name__ == '__main__':
    main()
