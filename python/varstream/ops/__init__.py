"""The operators: argument checks, fakes and autograd around ``torch.ops.varstream``."""
