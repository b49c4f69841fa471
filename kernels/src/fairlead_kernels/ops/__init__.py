"""One folder per operation: its public function, reference, C and Triton kernels, and spec."""
