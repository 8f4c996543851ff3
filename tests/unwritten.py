"""What of the exercise is still as it was handed out."""
import ast
import os

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The bodies that the handbook marks TODO: class, what the loops have to fill, where the formula is.
BODIES = {'_conv': ('ConvolutionLayer', 'outputs', '2.5.2.1'),
          '_conv_back': ('ConvolutionLayer', 'in_grad', '2.5.2.1'),
          '_pool': ('MaxPoolLayer', 'outputs and argidx', '2.5.2.2'),
          '_pool_back': ('MaxPoolLayer', 'in_grad', '2.5.2.2')}


def unwritten(project=PROJECT):
    """{body: a sentence that says what to write} for those in layer.py that neither loop nor call anything."""
    with open(os.path.join(project, 'layer.py'), encoding='utf-8') as file:
        tree = ast.parse(file.read())
    methods = {(owner.name, node.name): node for owner in tree.body if isinstance(owner, ast.ClassDef)
               for node in owner.body if isinstance(node, ast.FunctionDef)}
    found = {}
    for name, (owner, results, section) in BODIES.items():
        node = methods.get((owner, name))
        if node and not any(isinstance(part, (ast.For, ast.While, ast.Call))
                            for statement in node.body for part in ast.walk(statement)):
            found[name] = ('layer.py line %d: %s.%s is not written yet: fill %s with for loops, by the formula of '
                           'handbook %s' % (node.body[0].lineno, owner, name, results, section))
    return found
