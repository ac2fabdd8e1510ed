# CUDA kernels, csrc/<operator>/cuda/*.cu, are built in two ways:
#   with nvcc into _C, if torch has CUDA; SEQKERNELS_HAVE_CUDA is defined for the host sources;
#   with the C++ compiler and the emulation in tests/cuda_on_cpu, together with the host sources, into a test module.
#   Its ops are torch.ops.seqkernels_emulated (target cuda_on_cpu). This needs neither a GPU nor a CUDA toolkit.
# nvcc is called by a custom rule, because CMake's CUDA language first links a test program, which needs a full toolkit.
set(SEQKERNELS_CUDA_ARCHITECTURES "80;90a;100" CACHE STRING "Compute capabilities to compile for; 100 includes PTX")
set(SEQKERNELS_NVCC "" CACHE FILEPATH "nvcc; if empty, searched on PATH and in /usr/local/cuda/bin")

# The object name of csrc/recurrent/cuda/grid.cu is recurrent_grid, because file names repeat across operators.
function(object_stem variable source)
  cmake_path(GET source STEM stem)
  cmake_path(GET source PARENT_PATH folder)
  if(folder MATCHES "/csrc/([a-z_]+)/cuda$")
    set(stem "${CMAKE_MATCH_1}_${stem}")
  endif()
  set(${variable} "${stem}" PARENT_SCOPE)
endfunction()

set(cuda_sources)
foreach(folder IN LISTS SEQKERNELS_OPERATORS)
  file(GLOB found CONFIGURE_DEPENDS csrc/${folder}/cuda/*.cu)
  list(APPEND cuda_sources ${found})
endforeach()

# ---- into seqkernels._C ----
if(SEQKERNELS_NVCC)
  set(nvcc "${SEQKERNELS_NVCC}")
else()
  find_program(nvcc nvcc PATHS "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin NO_CACHE)
endif()
set(nvcc_version none)
if(nvcc)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE answer ERROR_QUIET)
  if(answer MATCHES "release ([0-9]+\\.[0-9]+)")
    set(nvcc_version ${CMAKE_MATCH_1})
  endif()
endif()
string(REGEX MATCH "^[0-9]+" nvcc_major ${nvcc_version})
string(REGEX MATCH "^[0-9]+" torch_cuda_major ${torch_cuda})

set(cuda_obstacle "")
if(SEQKERNELS_CUDA STREQUAL "OFF")
  set(cuda_obstacle "SEQKERNELS_CUDA=OFF")
elseif(NOT cuda_sources)
  set(cuda_obstacle "no operator has CUDA kernels yet")
elseif(torch_cuda STREQUAL "none")
  set(cuda_obstacle "torch ${torch_version} is built without CUDA")
elseif(nvcc_version STREQUAL "none")
  set(cuda_obstacle "no nvcc was found (PATH, CUDA_HOME, -DSEQKERNELS_NVCC=)")
elseif(NOT nvcc_major STREQUAL torch_cuda_major)
  set(cuda_obstacle "torch is built for CUDA ${torch_cuda}, nvcc is from CUDA ${nvcc_version}")
elseif(nvcc_version VERSION_LESS 12.8)
  set(cuda_obstacle "nvcc must be from CUDA 12.8 or later, got ${nvcc_version}")
endif()
if(cuda_obstacle AND SEQKERNELS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "seqkernels: SEQKERNELS_CUDA=ON, but ${cuda_obstacle}")
endif()

if(cuda_obstacle)
  set(cuda_status "no: ${cuda_obstacle}")
else()
  # The runtime library of torch's wheel (which lacks the unversioned name that linkers search), or of the toolkit.
  cmake_path(GET torch_root PARENT_PATH site_packages)
  file(GLOB cudart "${site_packages}/nvidia/cu${nvcc_major}/lib/libcudart.so*"
       "${site_packages}/nvidia/cuda_runtime/lib/libcudart.so*")
  if(NOT cudart)
    file(REAL_PATH "${nvcc}" program)
    cmake_path(GET program PARENT_PATH bin)
    file(GLOB cudart "${bin}/../lib64/libcudart.so" "${bin}/../targets/*/lib/libcudart.so"
         "$ENV{CUDA_HOME}/lib64/libcudart.so" /usr/local/cuda/lib64/libcudart.so)
  endif()
  if(NOT cudart)
    message(FATAL_ERROR "seqkernels: libcudart of CUDA ${torch_cuda} is neither beside torch nor in the toolkit of ${nvcc}")
  endif()
  list(GET cudart 0 cudart)
  # Code for Ampere (and Ada), Hopper and Blackwell; PTX of the latter for later architectures.
  set(cuda_architectures)
  foreach(capability IN LISTS SEQKERNELS_CUDA_ARCHITECTURES)
    set(code "sm_${capability}")
    if(capability EQUAL 100)
      set(code "[sm_100,compute_100]")
    endif()
    list(APPEND cuda_architectures -gencode=arch=compute_${capability},code=${code})
  endforeach()
  # No contraction of multiply and add, as on the CPU.
  set(cuda_flags -std=c++17 -O3 --fmad=false --threads=2
      -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=)
  set(cuda_objects)
  foreach(source IN LISTS cuda_sources)
    object_stem(stem "${source}")
    set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${stem}.o")
    add_custom_command(
      OUTPUT "${object}"
      COMMAND "${CMAKE_COMMAND}" -E make_directory "${CMAKE_CURRENT_BINARY_DIR}/cuda"
      COMMAND "${nvcc}" ${cuda_flags} ${cuda_architectures} -ccbin "${CMAKE_CXX_COMPILER}"
              -I "${CMAKE_CURRENT_SOURCE_DIR}/csrc" -MD -MF "${object}.d" -MT "${object}" -c "${source}" -o "${object}"
      DEPENDS "${source}" DEPFILE "${object}.d" VERBATIM COMMAND_EXPAND_LISTS)
    list(APPEND cuda_objects "${object}")
  endforeach()
  # A separate library, so that nvcc runs in parallel with the CPU kernels.
  set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  add_library(kernels_cuda STATIC ${cuda_objects})
  set_target_properties(kernels_cuda PROPERTIES LINKER_LANGUAGE CXX)
  list(JOIN SEQKERNELS_CUDA_ARCHITECTURES "," capabilities)
  string(REPLACE "a" "" capabilities "${capabilities}")  # 90a as a number
  foreach(module host registration _C seqkernels_ops)
    target_compile_definitions(${module} PRIVATE SEQKERNELS_HAVE_CUDA "SEQKERNELS_CUDA_ARCHITECTURES=${capabilities}"
                               USE_CUDA)  # USE_CUDA: torch declares its streams
    target_link_libraries(${module} PRIVATE kernels_cuda torch_cuda c10_cuda "${cudart}")
  endforeach()
  set(cuda_status "yes: nvcc ${nvcc_version} for ${SEQKERNELS_CUDA_ARCHITECTURES}, against torch's CUDA ${torch_cuda}")
endif()

# ---- on the CPU, for tests ----
# Tail calls and merged branch ends would make the line numbers of reports inexact. With -O2, the tests are no faster and the
# build takes half as long again.
set(emulation_flags -O1 -g1 -ffp-contract=off -fno-optimize-sibling-calls -Wno-unused-const-variable)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND emulation_flags -fno-crossjumping -fno-tree-tail-merge)
endif()
set(emulation tests/cuda_on_cpu)
set(SEQKERNELS_EMULATION_OUTPUT "${CMAKE_CURRENT_SOURCE_DIR}/${emulation}" CACHE PATH "Folder of the emulated modules")

# Wraps a .cu file in a .cpp file, which CMake compiles as C++.
function(emulated_source variable source)
  object_stem(stem "${source}")
  set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/emulated/${stem}.cpp")
  file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${source}\"\n" @ONLY)
  set_source_files_properties("${wrapper}" PROPERTIES COMPILE_OPTIONS "${emulation_flags}")
  set(${variable} "${wrapper}" PARENT_SCOPE)
endfunction()
function(emulated_module module)
  target_sources(${module} PRIVATE ${emulation}/emulation.cpp ${emulation}/warps.cpp)
  target_include_directories(${module} PRIVATE csrc ${emulation})
  target_compile_definitions(${module} PRIVATE SEQKERNELS_EMULATE_CUDA)
  target_link_libraries(${module} PRIVATE ${CMAKE_DL_LIBS})
  set_target_properties(${module} PROPERTIES EXCLUDE_FROM_ALL TRUE
                        LIBRARY_OUTPUT_DIRECTORY "${SEQKERNELS_EMULATION_OUTPUT}")
endfunction()
set_source_files_properties(${emulation}/emulation.cpp ${emulation}/warps.cpp
                            PROPERTIES COMPILE_OPTIONS "${emulation_flags}")

emulated_source(selftest "${CMAKE_CURRENT_SOURCE_DIR}/${emulation}/selftest_cuda.cu")
add_library(_selftest MODULE ${selftest})
set_target_properties(_selftest PROPERTIES PREFIX "")
emulated_module(_selftest)
add_custom_target(cuda_on_cpu DEPENDS _selftest)

if(cuda_sources)
  set(emulated_sources)
  foreach(source IN LISTS cuda_sources)
    emulated_source(wrapper "${source}")
    list(APPEND emulated_sources "${wrapper}")
  endforeach()
  Python_add_library(_emulated MODULE USE_SABI 3.10 WITH_SOABI
                     csrc/module.cpp csrc/library.cpp ${host_sources} ${emulated_sources})
  host_module(_emulated)
  emulated_module(_emulated)
  add_dependencies(cuda_on_cpu _emulated)
endif()
