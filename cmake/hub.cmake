# The module of a kernel of the Hugging Face Hub (`make hub`), for CPUs. The hub loads several versions of a kernel into
# one process, so its ops have a namespace of their own: the registration is compiled once more, and the rest of the host
# sources if the extension has CUDA kernels.
set(SEQKERNELS_HUB_NAMESPACE "" CACHE STRING "Namespace of the ops of the target hub")
if(SEQKERNELS_HUB_NAMESPACE)
  set(host_of_hub $<TARGET_OBJECTS:host>)
  if(TARGET kernels_cuda)
    set(host_of_hub ${host_sources})
  endif()
  Python_add_library(hub MODULE USE_SABI 3.10 WITH_SOABI csrc/module.cpp csrc/library.cpp ${host_of_hub})
  host_module(hub)
  target_compile_definitions(hub PRIVATE SEQKERNELS_NAMESPACE=${SEQKERNELS_HUB_NAMESPACE})
  set_target_properties(hub PROPERTIES EXCLUDE_FROM_ALL TRUE OUTPUT_NAME _C
                        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/hub")
endif()
