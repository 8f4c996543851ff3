"""Let numba optimise a loop once, in the function that Python calls, not again in each function on the way there.

numba hands every function that it compiles to LLVM by itself, with all that it calls linked into it: each loop of
prange, each of the two wrappers around that, and each function that only others call.  All of them are optimised as
they stand and made machine code of, although nothing but the last one is ever run: a loop that is five calls deep
comes to it ten times.  `tests/bench.py --network` measures what a first run gains here.

Here a function waits: it goes into its callers as it is, and to the optimiser and into machine code when numba asks
for an address in it.  None of numba's own steps is changed, only when they are taken.

Beside that numba does some things over and over, which are done with less ado:

* it lists its options tens of thousands of times, to see whether a call was compiled with the same ones, and to tell
  whoever measures its steps (`values`, and no `pformat`);
* it looks for the type of every a + b by trying all kinds of + that it has, for each of them that it comes to and in
  every round of its inference (`get_call_type`);
* it works out after each of its steps from where to where a variable is in use, and reads it after a few of them
  (`run`).
"""
import numba

TRIED = (0, 56), (0, 68)    # first and last version; others compile in their own way

try:
    from numba.core import compiler_machinery, transforms
    from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
    from numba.core.environment import lookup_environment
    from numba.core.postproc import PostProcessor, VariableLifetime
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys
    from numba.core.targetconfig import ConfigStack, TargetConfig
    from numba.core.types.functions import BaseFunction
    look_for_call_type, process_all = BaseFunction.get_call_type, PostProcessor.run    # numba's own
except (AttributeError, ImportError):    # of another version
    JITCodeLibrary = JITCPUCodegen = object


class WaitingLibrary(JITCodeLibrary):
    """What numba has of one compiled function and of all that it calls."""

    waits = False

    def _optimize_final_module(self):
        """Optimise at once, as it is small, what calls nothing that waits; but only with LLVM's former pass managers.

        They take several numbers at a time in some loops of the pooling only while these stand alone, and the present
        ones only when they do not.
        """
        alone = not any(getattr(library, 'waits', False) for library in self._linking_libraries)
        if alone and hasattr(self._codegen, '_mpm_full'):
            super()._optimize_final_module()

    def _finalize_final_module(self):
        if self._shared_module is not None:    # read from the disk, as machine code
            super()._finalize_final_module()
        else:
            self.waits = self._finalized = True

    def get_pointer_to_function(self, name):
        """Address of a function in machine code, or 0."""
        self._ensure_finalized()
        # What Python calls is another function around a compiled one.  Numba 0.56 asks for the address of that one as
        # well, but makes no use of it.
        inside = name.startswith('_ZN') and not name.startswith('_ZN7cpython')
        if self.waits and not inside and any(function.name == name for function in self.get_defined_functions()):
            self.waits = False
            super()._optimize_final_module()
            super()._finalize_final_module()
            for variable in self._final_module.global_variables:
                environment = lookup_environment(variable.name)    # what a function needs to print an array, for one
                if environment is not None:
                    self.codegen.set_env(variable.name, environment)
        return super().get_pointer_to_function(name)


class WaitingCodegen(JITCPUCodegen):
    """What makes the libraries."""

    _library_class = WaitingLibrary

    def set_env(self, env_name, env):
        """Tell machine code where its environment is; what waits has no machine code yet."""
        if self._engine.is_symbol_defined(env_name):
            super().set_env(env_name, env)


DEFAULTS = {}    # of each class of options: {name: value}


def values(config):
    """What TargetConfig.values returns, {name: value} of all options, without asking for each of them by its name."""
    kind = type(config)
    if kind not in DEFAULTS:
        DEFAULTS[kind] = {name: option.default for name, option in kind.options.items()}
    return dict(DEFAULTS[kind], **config._values)


SIGNATURES = {}    # that get_call_type returned


def get_call_type(function, context, args, kws):
    """What BaseFunction.get_call_type returns: the signature of a function for arguments of these types.

    It is looked for once under the same options, as numba itself keeps by these what it has compiled.
    """
    question = function, context, tuple(args), tuple(kws.items()), ConfigStack.top_or_none()
    if question not in SIGNATURES:
        SIGNATURES[question] = look_for_call_type(function, context, args, kws)
    return SIGNATURES[question]


def run(processor, emit_dels=False, extend_lifetimes=False):
    """What PostProcessor.run does, but variables' lifetimes wait until they are read.

    They do not where the end of each is to be put in, nor in a generator.
    """
    function = processor.func_ir
    if emit_dels or function.is_generator:
        process_all(processor, emit_dels, extend_lifetimes)
    else:
        function.blocks = transforms.canonicalize_cfg(function.blocks)
        function.variable_lifetime = VariableLifetime(function.blocks)
        function.generator_info = None


def compile_once():
    """Let numba do so from now on in this process.

    Returns
    -------
    bool
        Whether it will: not in another version than those that were tried.
    """
    try:
        if not TRIED[0] <= numba.version_info.short <= TRIED[1]:
            return False
        codegen = cpu_target.target_context.codegen()
        rtsys.initialize(cpu_target.target_context)    # what counts references: machine code needs it when it is added
        if type(codegen) is JITCPUCodegen:
            codegen.__class__ = WaitingCodegen
            TargetConfig.values = values
            BaseFunction.get_call_type = get_call_type
            PostProcessor.run = run
            compiler_machinery.pformat = repr    # of older versions: nobody here reads it laid out in lines
        return isinstance(codegen, WaitingCodegen)
    except (AttributeError, NameError, TypeError):
        return False
