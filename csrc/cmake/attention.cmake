# Sources of the attention kernels' instances, one per dtype and padded head dims, generated from
# csrc/attention/*_instance.cu.in. The list of head dims is the one in forward_launch.cu.
get_filename_component(attention_templates "${CMAKE_CURRENT_LIST_DIR}/../attention" ABSOLUTE)
set(attention_head_dims 32/32 64/64 96/96 128/128 192/128 192/192 256/256)

# Sets out_var to the generated files.
function(varstream_attention_instances out_var)
  set(sources "")
  foreach(dtype bf16 fp16)
    set(element __nv_bfloat16)
    if(dtype STREQUAL fp16)
      set(element __half)
    endif()
    foreach(dims ${attention_head_dims})
      string(REPLACE "/" ";" dims "${dims}")
      list(GET dims 0 dim)
      list(GET dims 1 value_dim)
      set(source "${CMAKE_CURRENT_BINARY_DIR}/attention/forward_${dtype}_${dim}_${value_dim}.cu")
      configure_file("${attention_templates}/forward_instance.cu.in" "${source}" @ONLY)
      list(APPEND sources "${source}")
    endforeach()
  endforeach()
  set(${out_var} "${sources}" PARENT_SCOPE)
endfunction()
