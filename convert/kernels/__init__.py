"""What dynamic-linear layers compute, one formula a file: first as the paper has it, then as eager mode runs it.

The plain function stands first. It is ordinary differentiable torch, and it is what compilers, exporters, `torch.func`
and forward mode see. The lean form below it computes the same with fewer passes over memory and less kept for the
backward pass. `dispatch` alone decides which of them runs.
"""
