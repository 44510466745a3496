/* The names under which programs link to libcuda: what the API's headers make of each function's name, CUDA 13.0. One
 * that a driver does not have costs nothing until somebody calls it. */
#define ALL_ENTRIES \
    ENTRY(cuArray3DCreate_v2) ENTRY(cuArray3DGetDescriptor_v2) ENTRY(cuArrayCreate_v2) ENTRY(cuArrayDestroy) \
    ENTRY(cuArrayGetDescriptor_v2) ENTRY(cuArrayGetMemoryRequirements) ENTRY(cuArrayGetPlane) \
    ENTRY(cuArrayGetSparseProperties) ENTRY(cuCoredumpGetAttribute) ENTRY(cuCoredumpGetAttributeGlobal) \
    ENTRY(cuCoredumpSetAttribute) ENTRY(cuCoredumpSetAttributeGlobal) ENTRY(cuCtxAttach) ENTRY(cuCtxCreate_v2) \
    ENTRY(cuCtxCreate_v3) ENTRY(cuCtxCreate_v4) ENTRY(cuCtxDestroy_v2) ENTRY(cuCtxDetach) \
    ENTRY(cuCtxDisablePeerAccess) ENTRY(cuCtxEnablePeerAccess) ENTRY(cuCtxFromGreenCtx) ENTRY(cuCtxGetApiVersion) \
    ENTRY(cuCtxGetCacheConfig) ENTRY(cuCtxGetCurrent) ENTRY(cuCtxGetDevResource) ENTRY(cuCtxGetDevice) \
    ENTRY(cuCtxGetDevice_v2) ENTRY(cuCtxGetExecAffinity) ENTRY(cuCtxGetFlags) ENTRY(cuCtxGetId) ENTRY(cuCtxGetLimit) \
    ENTRY(cuCtxGetSharedMemConfig) ENTRY(cuCtxGetStreamPriorityRange) ENTRY(cuCtxPopCurrent_v2) \
    ENTRY(cuCtxPushCurrent_v2) ENTRY(cuCtxRecordEvent) ENTRY(cuCtxResetPersistingL2Cache) ENTRY(cuCtxSetCacheConfig) \
    ENTRY(cuCtxSetCurrent) ENTRY(cuCtxSetFlags) ENTRY(cuCtxSetLimit) ENTRY(cuCtxSetSharedMemConfig) \
    ENTRY(cuCtxSynchronize) ENTRY(cuCtxSynchronize_v2) ENTRY(cuCtxWaitEvent) ENTRY(cuDestroyExternalMemory) \
    ENTRY(cuDestroyExternalSemaphore) ENTRY(cuDevResourceGenerateDesc) ENTRY(cuDevSmResourceSplitByCount) \
    ENTRY(cuDeviceCanAccessPeer) ENTRY(cuDeviceComputeCapability) ENTRY(cuDeviceGet) ENTRY(cuDeviceGetAttribute) \
    ENTRY(cuDeviceGetByPCIBusId) ENTRY(cuDeviceGetCount) ENTRY(cuDeviceGetDefaultMemPool) \
    ENTRY(cuDeviceGetDevResource) ENTRY(cuDeviceGetExecAffinitySupport) ENTRY(cuDeviceGetGraphMemAttribute) \
    ENTRY(cuDeviceGetHostAtomicCapabilities) ENTRY(cuDeviceGetLuid) ENTRY(cuDeviceGetMemPool) ENTRY(cuDeviceGetName) \
    ENTRY(cuDeviceGetNvSciSyncAttributes) ENTRY(cuDeviceGetP2PAtomicCapabilities) ENTRY(cuDeviceGetP2PAttribute) \
    ENTRY(cuDeviceGetPCIBusId) ENTRY(cuDeviceGetProperties) ENTRY(cuDeviceGetTexture1DLinearMaxWidth) \
    ENTRY(cuDeviceGetUuid_v2) ENTRY(cuDeviceGraphMemTrim) ENTRY(cuDevicePrimaryCtxGetState) \
    ENTRY(cuDevicePrimaryCtxRelease_v2) ENTRY(cuDevicePrimaryCtxReset_v2) ENTRY(cuDevicePrimaryCtxRetain) \
    ENTRY(cuDevicePrimaryCtxSetFlags_v2) ENTRY(cuDeviceRegisterAsyncNotification) \
    ENTRY(cuDeviceSetGraphMemAttribute) ENTRY(cuDeviceSetMemPool) ENTRY(cuDeviceTotalMem_v2) \
    ENTRY(cuDeviceUnregisterAsyncNotification) ENTRY(cuEventCreate) ENTRY(cuEventDestroy_v2) \
    ENTRY(cuEventElapsedTime_v2) ENTRY(cuEventQuery) ENTRY(cuEventRecord) ENTRY(cuEventRecordWithFlags) \
    ENTRY(cuEventRecordWithFlags_ptsz) ENTRY(cuEventRecord_ptsz) ENTRY(cuEventSynchronize) \
    ENTRY(cuExternalMemoryGetMappedBuffer) ENTRY(cuExternalMemoryGetMappedMipmappedArray) \
    ENTRY(cuFlushGPUDirectRDMAWrites) ENTRY(cuFuncGetAttribute) ENTRY(cuFuncGetModule) ENTRY(cuFuncGetName) \
    ENTRY(cuFuncGetParamInfo) ENTRY(cuFuncIsLoaded) ENTRY(cuFuncLoad) ENTRY(cuFuncSetAttribute) \
    ENTRY(cuFuncSetBlockShape) ENTRY(cuFuncSetCacheConfig) ENTRY(cuFuncSetSharedMemConfig) \
    ENTRY(cuFuncSetSharedSize) ENTRY(cuGetProcAddress_v2) ENTRY(cuGraphAddBatchMemOpNode) \
    ENTRY(cuGraphAddChildGraphNode) ENTRY(cuGraphAddDependencies_v2) ENTRY(cuGraphAddEmptyNode) \
    ENTRY(cuGraphAddEventRecordNode) ENTRY(cuGraphAddEventWaitNode) ENTRY(cuGraphAddExternalSemaphoresSignalNode) \
    ENTRY(cuGraphAddExternalSemaphoresWaitNode) ENTRY(cuGraphAddHostNode) ENTRY(cuGraphAddKernelNode_v2) \
    ENTRY(cuGraphAddMemAllocNode) ENTRY(cuGraphAddMemFreeNode) ENTRY(cuGraphAddMemcpyNode) \
    ENTRY(cuGraphAddMemsetNode) ENTRY(cuGraphAddNode_v2) ENTRY(cuGraphBatchMemOpNodeGetParams) \
    ENTRY(cuGraphBatchMemOpNodeSetParams) ENTRY(cuGraphChildGraphNodeGetGraph) ENTRY(cuGraphClone) \
    ENTRY(cuGraphConditionalHandleCreate) ENTRY(cuGraphCreate) ENTRY(cuGraphDebugDotPrint) ENTRY(cuGraphDestroy) \
    ENTRY(cuGraphDestroyNode) ENTRY(cuGraphEventRecordNodeGetEvent) ENTRY(cuGraphEventRecordNodeSetEvent) \
    ENTRY(cuGraphEventWaitNodeGetEvent) ENTRY(cuGraphEventWaitNodeSetEvent) \
    ENTRY(cuGraphExecBatchMemOpNodeSetParams) ENTRY(cuGraphExecChildGraphNodeSetParams) ENTRY(cuGraphExecDestroy) \
    ENTRY(cuGraphExecEventRecordNodeSetEvent) ENTRY(cuGraphExecEventWaitNodeSetEvent) \
    ENTRY(cuGraphExecExternalSemaphoresSignalNodeSetParams) ENTRY(cuGraphExecExternalSemaphoresWaitNodeSetParams) \
    ENTRY(cuGraphExecGetFlags) ENTRY(cuGraphExecHostNodeSetParams) ENTRY(cuGraphExecKernelNodeSetParams_v2) \
    ENTRY(cuGraphExecMemcpyNodeSetParams) ENTRY(cuGraphExecMemsetNodeSetParams) ENTRY(cuGraphExecNodeSetParams) \
    ENTRY(cuGraphExecUpdate_v2) ENTRY(cuGraphExternalSemaphoresSignalNodeGetParams) \
    ENTRY(cuGraphExternalSemaphoresSignalNodeSetParams) ENTRY(cuGraphExternalSemaphoresWaitNodeGetParams) \
    ENTRY(cuGraphExternalSemaphoresWaitNodeSetParams) ENTRY(cuGraphGetEdges_v2) ENTRY(cuGraphGetNodes) \
    ENTRY(cuGraphGetRootNodes) ENTRY(cuGraphHostNodeGetParams) ENTRY(cuGraphHostNodeSetParams) \
    ENTRY(cuGraphInstantiateWithFlags) ENTRY(cuGraphInstantiateWithParams) ENTRY(cuGraphInstantiateWithParams_ptsz) \
    ENTRY(cuGraphInstantiate_v2) ENTRY(cuGraphKernelNodeCopyAttributes) ENTRY(cuGraphKernelNodeGetAttribute) \
    ENTRY(cuGraphKernelNodeGetParams_v2) ENTRY(cuGraphKernelNodeSetAttribute) ENTRY(cuGraphKernelNodeSetParams_v2) \
    ENTRY(cuGraphLaunch) ENTRY(cuGraphLaunch_ptsz) ENTRY(cuGraphMemAllocNodeGetParams) \
    ENTRY(cuGraphMemFreeNodeGetParams) ENTRY(cuGraphMemcpyNodeGetParams) ENTRY(cuGraphMemcpyNodeSetParams) \
    ENTRY(cuGraphMemsetNodeGetParams) ENTRY(cuGraphMemsetNodeSetParams) ENTRY(cuGraphNodeFindInClone) \
    ENTRY(cuGraphNodeGetDependencies_v2) ENTRY(cuGraphNodeGetDependentNodes_v2) ENTRY(cuGraphNodeGetEnabled) \
    ENTRY(cuGraphNodeGetType) ENTRY(cuGraphNodeSetEnabled) ENTRY(cuGraphNodeSetParams) \
    ENTRY(cuGraphReleaseUserObject) ENTRY(cuGraphRemoveDependencies_v2) ENTRY(cuGraphRetainUserObject) \
    ENTRY(cuGraphUpload) ENTRY(cuGraphUpload_ptsz) ENTRY(cuGraphicsMapResources) ENTRY(cuGraphicsMapResources_ptsz) \
    ENTRY(cuGraphicsResourceGetMappedMipmappedArray) ENTRY(cuGraphicsResourceGetMappedPointer_v2) \
    ENTRY(cuGraphicsResourceSetMapFlags_v2) ENTRY(cuGraphicsSubResourceGetMappedArray) \
    ENTRY(cuGraphicsUnmapResources) ENTRY(cuGraphicsUnmapResources_ptsz) ENTRY(cuGraphicsUnregisterResource) \
    ENTRY(cuGreenCtxCreate) ENTRY(cuGreenCtxDestroy) ENTRY(cuGreenCtxGetDevResource) ENTRY(cuGreenCtxGetId) \
    ENTRY(cuGreenCtxRecordEvent) ENTRY(cuGreenCtxStreamCreate) ENTRY(cuGreenCtxWaitEvent) \
    ENTRY(cuImportExternalMemory) ENTRY(cuImportExternalSemaphore) ENTRY(cuInit) ENTRY(cuIpcCloseMemHandle) \
    ENTRY(cuIpcGetEventHandle) ENTRY(cuIpcGetMemHandle) ENTRY(cuIpcOpenEventHandle) ENTRY(cuIpcOpenMemHandle_v2) \
    ENTRY(cuKernelGetAttribute) ENTRY(cuKernelGetFunction) ENTRY(cuKernelGetLibrary) ENTRY(cuKernelGetName) \
    ENTRY(cuKernelGetParamInfo) ENTRY(cuKernelSetAttribute) ENTRY(cuKernelSetCacheConfig) ENTRY(cuLaunch) \
    ENTRY(cuLaunchCooperativeKernel) ENTRY(cuLaunchCooperativeKernelMultiDevice) \
    ENTRY(cuLaunchCooperativeKernel_ptsz) ENTRY(cuLaunchGrid) ENTRY(cuLaunchGridAsync) ENTRY(cuLaunchHostFunc) \
    ENTRY(cuLaunchHostFunc_ptsz) ENTRY(cuLaunchKernel) ENTRY(cuLaunchKernelEx) ENTRY(cuLaunchKernelEx_ptsz) \
    ENTRY(cuLaunchKernel_ptsz) ENTRY(cuLibraryEnumerateKernels) ENTRY(cuLibraryGetGlobal) ENTRY(cuLibraryGetKernel) \
    ENTRY(cuLibraryGetKernelCount) ENTRY(cuLibraryGetManaged) ENTRY(cuLibraryGetModule) \
    ENTRY(cuLibraryGetUnifiedFunction) ENTRY(cuLibraryLoadData) ENTRY(cuLibraryLoadFromFile) ENTRY(cuLibraryUnload) \
    ENTRY(cuLinkAddData_v2) ENTRY(cuLinkAddFile_v2) ENTRY(cuLinkCreate_v2) ENTRY(cuLogsCurrent) \
    ENTRY(cuLogsDumpToFile) ENTRY(cuLogsDumpToMemory) ENTRY(cuLogsRegisterCallback) ENTRY(cuLogsUnregisterCallback) \
    ENTRY(cuMemAddressFree) ENTRY(cuMemAddressReserve) ENTRY(cuMemAdvise_v2) ENTRY(cuMemAllocAsync) \
    ENTRY(cuMemAllocAsync_ptsz) ENTRY(cuMemAllocFromPoolAsync) ENTRY(cuMemAllocFromPoolAsync_ptsz) \
    ENTRY(cuMemAllocHost_v2) ENTRY(cuMemAllocManaged) ENTRY(cuMemAllocPitch_v2) ENTRY(cuMemAlloc_v2) \
    ENTRY(cuMemBatchDecompressAsync) ENTRY(cuMemBatchDecompressAsync_ptsz) ENTRY(cuMemCreate) \
    ENTRY(cuMemDiscardAndPrefetchBatchAsync) ENTRY(cuMemDiscardAndPrefetchBatchAsync_ptsz) \
    ENTRY(cuMemDiscardBatchAsync) ENTRY(cuMemDiscardBatchAsync_ptsz) ENTRY(cuMemExportToShareableHandle) \
    ENTRY(cuMemFreeAsync) ENTRY(cuMemFreeAsync_ptsz) ENTRY(cuMemFreeHost) ENTRY(cuMemFree_v2) ENTRY(cuMemGetAccess) \
    ENTRY(cuMemGetAddressRange_v2) ENTRY(cuMemGetAllocationGranularity) \
    ENTRY(cuMemGetAllocationPropertiesFromHandle) ENTRY(cuMemGetDefaultMemPool) ENTRY(cuMemGetHandleForAddressRange) \
    ENTRY(cuMemGetInfo_v2) ENTRY(cuMemGetMemPool) ENTRY(cuMemHostAlloc) ENTRY(cuMemHostGetDevicePointer_v2) \
    ENTRY(cuMemHostGetFlags) ENTRY(cuMemHostRegister_v2) ENTRY(cuMemHostUnregister) \
    ENTRY(cuMemImportFromShareableHandle) ENTRY(cuMemMap) ENTRY(cuMemMapArrayAsync) ENTRY(cuMemMapArrayAsync_ptsz) \
    ENTRY(cuMemPoolCreate) ENTRY(cuMemPoolDestroy) ENTRY(cuMemPoolExportPointer) \
    ENTRY(cuMemPoolExportToShareableHandle) ENTRY(cuMemPoolGetAccess) ENTRY(cuMemPoolGetAttribute) \
    ENTRY(cuMemPoolImportFromShareableHandle) ENTRY(cuMemPoolImportPointer) ENTRY(cuMemPoolSetAccess) \
    ENTRY(cuMemPoolSetAttribute) ENTRY(cuMemPoolTrimTo) ENTRY(cuMemPrefetchAsync_ptsz) ENTRY(cuMemPrefetchAsync_v2) \
    ENTRY(cuMemPrefetchAsync_v2_ptsz) ENTRY(cuMemPrefetchBatchAsync) ENTRY(cuMemPrefetchBatchAsync_ptsz) \
    ENTRY(cuMemRangeGetAttribute) ENTRY(cuMemRangeGetAttributes) ENTRY(cuMemRelease) \
    ENTRY(cuMemRetainAllocationHandle) ENTRY(cuMemSetAccess) ENTRY(cuMemSetMemPool) ENTRY(cuMemUnmap) \
    ENTRY(cuMemcpy) ENTRY(cuMemcpy2DAsync_v2) ENTRY(cuMemcpy2DAsync_v2_ptsz) ENTRY(cuMemcpy2DUnaligned_v2) \
    ENTRY(cuMemcpy2DUnaligned_v2_ptds) ENTRY(cuMemcpy2D_v2) ENTRY(cuMemcpy2D_v2_ptds) ENTRY(cuMemcpy3DAsync_v2) \
    ENTRY(cuMemcpy3DAsync_v2_ptsz) ENTRY(cuMemcpy3DBatchAsync_ptsz) ENTRY(cuMemcpy3DBatchAsync_v2) \
    ENTRY(cuMemcpy3DBatchAsync_v2_ptsz) ENTRY(cuMemcpy3DPeer) ENTRY(cuMemcpy3DPeerAsync) \
    ENTRY(cuMemcpy3DPeerAsync_ptsz) ENTRY(cuMemcpy3DPeer_ptds) ENTRY(cuMemcpy3D_v2) ENTRY(cuMemcpy3D_v2_ptds) \
    ENTRY(cuMemcpyAsync) ENTRY(cuMemcpyAsync_ptsz) ENTRY(cuMemcpyAtoA_v2) ENTRY(cuMemcpyAtoA_v2_ptds) \
    ENTRY(cuMemcpyAtoD_v2) ENTRY(cuMemcpyAtoD_v2_ptds) ENTRY(cuMemcpyAtoHAsync_v2) ENTRY(cuMemcpyAtoHAsync_v2_ptsz) \
    ENTRY(cuMemcpyAtoH_v2) ENTRY(cuMemcpyAtoH_v2_ptds) ENTRY(cuMemcpyBatchAsync_ptsz) ENTRY(cuMemcpyBatchAsync_v2) \
    ENTRY(cuMemcpyBatchAsync_v2_ptsz) ENTRY(cuMemcpyDtoA_v2) ENTRY(cuMemcpyDtoA_v2_ptds) ENTRY(cuMemcpyDtoDAsync_v2) \
    ENTRY(cuMemcpyDtoDAsync_v2_ptsz) ENTRY(cuMemcpyDtoD_v2) ENTRY(cuMemcpyDtoD_v2_ptds) ENTRY(cuMemcpyDtoHAsync_v2) \
    ENTRY(cuMemcpyDtoHAsync_v2_ptsz) ENTRY(cuMemcpyDtoH_v2) ENTRY(cuMemcpyDtoH_v2_ptds) ENTRY(cuMemcpyHtoAAsync_v2) \
    ENTRY(cuMemcpyHtoAAsync_v2_ptsz) ENTRY(cuMemcpyHtoA_v2) ENTRY(cuMemcpyHtoA_v2_ptds) ENTRY(cuMemcpyHtoDAsync_v2) \
    ENTRY(cuMemcpyHtoDAsync_v2_ptsz) ENTRY(cuMemcpyHtoD_v2) ENTRY(cuMemcpyHtoD_v2_ptds) ENTRY(cuMemcpyPeer) \
    ENTRY(cuMemcpyPeerAsync) ENTRY(cuMemcpyPeerAsync_ptsz) ENTRY(cuMemcpyPeer_ptds) ENTRY(cuMemcpy_ptds) \
    ENTRY(cuMemsetD16Async) ENTRY(cuMemsetD16Async_ptsz) ENTRY(cuMemsetD16_v2) ENTRY(cuMemsetD16_v2_ptds) \
    ENTRY(cuMemsetD2D16Async) ENTRY(cuMemsetD2D16Async_ptsz) ENTRY(cuMemsetD2D16_v2) ENTRY(cuMemsetD2D16_v2_ptds) \
    ENTRY(cuMemsetD2D32Async) ENTRY(cuMemsetD2D32Async_ptsz) ENTRY(cuMemsetD2D32_v2) ENTRY(cuMemsetD2D32_v2_ptds) \
    ENTRY(cuMemsetD2D8Async) ENTRY(cuMemsetD2D8Async_ptsz) ENTRY(cuMemsetD2D8_v2) ENTRY(cuMemsetD2D8_v2_ptds) \
    ENTRY(cuMemsetD32Async) ENTRY(cuMemsetD32Async_ptsz) ENTRY(cuMemsetD32_v2) ENTRY(cuMemsetD32_v2_ptds) \
    ENTRY(cuMemsetD8Async) ENTRY(cuMemsetD8Async_ptsz) ENTRY(cuMemsetD8_v2) ENTRY(cuMemsetD8_v2_ptds) \
    ENTRY(cuMipmappedArrayCreate) ENTRY(cuMipmappedArrayDestroy) ENTRY(cuMipmappedArrayGetLevel) \
    ENTRY(cuMipmappedArrayGetMemoryRequirements) ENTRY(cuMipmappedArrayGetSparseProperties) \
    ENTRY(cuModuleEnumerateFunctions) ENTRY(cuModuleGetFunction) ENTRY(cuModuleGetFunctionCount) \
    ENTRY(cuModuleGetGlobal_v2) ENTRY(cuModuleGetLoadingMode) ENTRY(cuModuleGetSurfRef) ENTRY(cuModuleGetTexRef) \
    ENTRY(cuModuleLoad) ENTRY(cuModuleLoadData) ENTRY(cuModuleLoadDataEx) ENTRY(cuModuleLoadFatBinary) \
    ENTRY(cuModuleUnload) ENTRY(cuMulticastAddDevice) ENTRY(cuMulticastBindAddr) ENTRY(cuMulticastBindMem) \
    ENTRY(cuMulticastCreate) ENTRY(cuMulticastGetGranularity) ENTRY(cuMulticastUnbind) \
    ENTRY(cuOccupancyAvailableDynamicSMemPerBlock) ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor) \
    ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags) ENTRY(cuOccupancyMaxActiveClusters) \
    ENTRY(cuOccupancyMaxPotentialBlockSize) ENTRY(cuOccupancyMaxPotentialBlockSizeWithFlags) \
    ENTRY(cuOccupancyMaxPotentialClusterSize) ENTRY(cuParamSetSize) ENTRY(cuParamSetTexRef) ENTRY(cuParamSetf) \
    ENTRY(cuParamSeti) ENTRY(cuParamSetv) ENTRY(cuPointerGetAttribute) ENTRY(cuPointerGetAttributes) \
    ENTRY(cuPointerSetAttribute) ENTRY(cuSignalExternalSemaphoresAsync) ENTRY(cuSignalExternalSemaphoresAsync_ptsz) \
    ENTRY(cuStreamAddCallback) ENTRY(cuStreamAddCallback_ptsz) ENTRY(cuStreamAttachMemAsync) \
    ENTRY(cuStreamAttachMemAsync_ptsz) ENTRY(cuStreamBatchMemOp_ptsz) ENTRY(cuStreamBatchMemOp_v2) \
    ENTRY(cuStreamBatchMemOp_v2_ptsz) ENTRY(cuStreamBeginCaptureToGraph) ENTRY(cuStreamBeginCaptureToGraph_ptsz) \
    ENTRY(cuStreamBeginCapture_ptsz) ENTRY(cuStreamBeginCapture_v2) ENTRY(cuStreamBeginCapture_v2_ptsz) \
    ENTRY(cuStreamCopyAttributes) ENTRY(cuStreamCopyAttributes_ptsz) ENTRY(cuStreamCreate) \
    ENTRY(cuStreamCreateWithPriority) ENTRY(cuStreamDestroy_v2) ENTRY(cuStreamEndCapture) \
    ENTRY(cuStreamEndCapture_ptsz) ENTRY(cuStreamGetAttribute) ENTRY(cuStreamGetAttribute_ptsz) \
    ENTRY(cuStreamGetCaptureInfo_ptsz) ENTRY(cuStreamGetCaptureInfo_v2) ENTRY(cuStreamGetCaptureInfo_v2_ptsz) \
    ENTRY(cuStreamGetCaptureInfo_v3) ENTRY(cuStreamGetCaptureInfo_v3_ptsz) ENTRY(cuStreamGetCtx) \
    ENTRY(cuStreamGetCtx_ptsz) ENTRY(cuStreamGetCtx_v2) ENTRY(cuStreamGetCtx_v2_ptsz) ENTRY(cuStreamGetDevice) \
    ENTRY(cuStreamGetDevice_ptsz) ENTRY(cuStreamGetFlags) ENTRY(cuStreamGetFlags_ptsz) ENTRY(cuStreamGetGreenCtx) \
    ENTRY(cuStreamGetId) ENTRY(cuStreamGetId_ptsz) ENTRY(cuStreamGetPriority) ENTRY(cuStreamGetPriority_ptsz) \
    ENTRY(cuStreamIsCapturing) ENTRY(cuStreamIsCapturing_ptsz) ENTRY(cuStreamQuery) ENTRY(cuStreamQuery_ptsz) \
    ENTRY(cuStreamSetAttribute) ENTRY(cuStreamSetAttribute_ptsz) ENTRY(cuStreamSynchronize) \
    ENTRY(cuStreamSynchronize_ptsz) ENTRY(cuStreamUpdateCaptureDependencies_ptsz) \
    ENTRY(cuStreamUpdateCaptureDependencies_v2) ENTRY(cuStreamUpdateCaptureDependencies_v2_ptsz) \
    ENTRY(cuStreamWaitEvent) ENTRY(cuStreamWaitEvent_ptsz) ENTRY(cuStreamWaitValue32_ptsz) \
    ENTRY(cuStreamWaitValue32_v2) ENTRY(cuStreamWaitValue32_v2_ptsz) ENTRY(cuStreamWaitValue64_ptsz) \
    ENTRY(cuStreamWaitValue64_v2) ENTRY(cuStreamWaitValue64_v2_ptsz) ENTRY(cuStreamWriteValue32_ptsz) \
    ENTRY(cuStreamWriteValue32_v2) ENTRY(cuStreamWriteValue32_v2_ptsz) ENTRY(cuStreamWriteValue64_ptsz) \
    ENTRY(cuStreamWriteValue64_v2) ENTRY(cuStreamWriteValue64_v2_ptsz) ENTRY(cuSurfObjectCreate) \
    ENTRY(cuSurfObjectDestroy) ENTRY(cuSurfObjectGetResourceDesc) ENTRY(cuSurfRefGetArray) ENTRY(cuSurfRefSetArray) \
    ENTRY(cuTensorMapEncodeIm2col) ENTRY(cuTensorMapEncodeIm2colWide) ENTRY(cuTensorMapEncodeTiled) \
    ENTRY(cuTensorMapReplaceAddress) ENTRY(cuTexObjectCreate) ENTRY(cuTexObjectDestroy) \
    ENTRY(cuTexObjectGetResourceDesc) ENTRY(cuTexObjectGetResourceViewDesc) ENTRY(cuTexObjectGetTextureDesc) \
    ENTRY(cuTexRefCreate) ENTRY(cuTexRefDestroy) ENTRY(cuTexRefGetAddressMode) ENTRY(cuTexRefGetAddress_v2) \
    ENTRY(cuTexRefGetArray) ENTRY(cuTexRefGetBorderColor) ENTRY(cuTexRefGetFilterMode) ENTRY(cuTexRefGetFlags) \
    ENTRY(cuTexRefGetFormat) ENTRY(cuTexRefGetMaxAnisotropy) ENTRY(cuTexRefGetMipmapFilterMode) \
    ENTRY(cuTexRefGetMipmapLevelBias) ENTRY(cuTexRefGetMipmapLevelClamp) ENTRY(cuTexRefGetMipmappedArray) \
    ENTRY(cuTexRefSetAddress2D_v2) ENTRY(cuTexRefSetAddress2D_v3) ENTRY(cuTexRefSetAddressMode) \
    ENTRY(cuTexRefSetAddress_v2) ENTRY(cuTexRefSetArray) ENTRY(cuTexRefSetBorderColor) ENTRY(cuTexRefSetFilterMode) \
    ENTRY(cuTexRefSetFlags) ENTRY(cuTexRefSetFormat) ENTRY(cuTexRefSetMaxAnisotropy) \
    ENTRY(cuTexRefSetMipmapFilterMode) ENTRY(cuTexRefSetMipmapLevelBias) ENTRY(cuTexRefSetMipmapLevelClamp) \
    ENTRY(cuTexRefSetMipmappedArray) ENTRY(cuThreadExchangeStreamCaptureMode) ENTRY(cuUserObjectCreate) \
    ENTRY(cuUserObjectRelease) ENTRY(cuUserObjectRetain) ENTRY(cuWaitExternalSemaphoresAsync) \
    ENTRY(cuWaitExternalSemaphoresAsync_ptsz)
