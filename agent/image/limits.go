package image

// Limits of the format. They bound what a decoder allocates for a file that lies.
const (
	MaxManifestBytes    = 8 << 20
	MaxDeviceStateBytes = 256 << 20
	MaxBlocks           = 4096
	MaxBlockRanges      = 4096 // of one block, by guest physical address
	MaxSegments         = 1 << segmentBits
	MaxDepth            = 4096
	MaxRAMBytes         = 16 << 40 // all blocks together
	MinPageBytes        = 4 << 10
	MaxPageBytes        = 2 << 20
	MaxHotRuns          = 8192
	MaxNameBytes        = 255

	maxSegmentBytes = 1 << 44 // 16 TiB: far beyond any, far below overflow
	maxJSONDepth    = 16
)
