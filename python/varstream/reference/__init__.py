"""CPU kernels composed from ATen, in any floating dtype: the product on machines without a GPU, the
oracle of every CUDA kernel. Importing a module here attaches its kernels to the schemas of
``csrc/torch/library.cpp``."""
