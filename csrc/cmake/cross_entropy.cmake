# Sources of the head's row kernels, generated from csrc/cross_entropy/*_instance.cu.in: the softmax
# for each pair of dtypes (stored values, gradient), the distillation for each dtype of gradients.
get_filename_component(cross_entropy_templates "${CMAKE_CURRENT_LIST_DIR}/../cross_entropy" ABSOLUTE)
set(cross_entropy_fp32 float)
set(cross_entropy_bf16 __nv_bfloat16)
set(cross_entropy_fp16 __half)

# Sets out_var to the generated files.
function(varstream_cross_entropy_instances out_var)
  set(sources "")
  foreach(instance softmax/fp32/fp32 softmax/fp32/bf16 softmax/fp32/fp16 softmax/bf16/bf16
                   softmax/fp16/fp16 distillation/fp32/fp32 distillation/fp32/bf16
                   distillation/fp32/fp16)
    string(REPLACE "/" ";" parts "${instance}")
    list(GET parts 0 kernel)
    list(GET parts 1 from)
    list(GET parts 2 to)
    set(values ${cross_entropy_${from}})
    set(gradient ${cross_entropy_${to}})
    set(source "${CMAKE_CURRENT_BINARY_DIR}/cross_entropy/${kernel}_${from}_${to}.cu")
    configure_file("${cross_entropy_templates}/${kernel}_instance.cu.in" "${source}" @ONLY)
    list(APPEND sources "${source}")
  endforeach()
  set(${out_var} "${sources}" PARENT_SCOPE)
endfunction()
