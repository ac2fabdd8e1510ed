# The module of a kernel of the Hugging Face Hub (`make hub`). The hub loads several versions of a kernel into one
# process, so its ops have a namespace of their own: the host sources are compiled once more, the kernels are the same.
set(SEQKERNELS_HUB_NAMESPACE "" CACHE STRING "Namespace of the ops of the target hub")
if(SEQKERNELS_HUB_NAMESPACE)
  Python_add_library(hub MODULE USE_SABI 3.10 WITH_SOABI csrc/module.cpp ${host_sources})
  host_module(hub)
  target_compile_definitions(hub PRIVATE SEQKERNELS_NAMESPACE=${SEQKERNELS_HUB_NAMESPACE})
  set_target_properties(hub PROPERTIES EXCLUDE_FROM_ALL TRUE OUTPUT_NAME _C
                        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/hub")
endif()
