package image

import (
	"fmt"
	"time"
)

// Names and versions of the format. See FORMAT.md for what may change when.
const (
	FormatName   = "ckagent-checkpoint"
	FormatMajor  = 1
	FormatMinor  = 2
	ManifestName = "manifest.json"

	pagemapName     = "pagemap"
	tagsName        = "tags"
	deviceStateName = "device-state"
	segmentPattern  = "seg-%04d"
)

// Manifest says what a checkpoint is and names every file of it. Store.Commit
// sets ID, VM and the versions; Summary.Apply sets what the Writer knows.
type Manifest struct {
	Format   string   `json:"format"`
	Version  int      `json:"version"`  // major: a reader refuses a higher one
	Minor    int      `json:"minor"`    // additions that an older reader may ignore
	Requires []string `json:"requires"` // features without which it must not be read

	ID        string    `json:"id"`
	VM        string    `json:"vm"`
	CreatedAt time.Time `json:"created_at"` // the stopped instant, UTC
	// Parent is the checkpoint whose unchanged pages this one took over, and Depth how
	// many such steps there are to one that stored every page itself. Nothing is read
	// from the parent: it may be gone.
	Parent  string `json:"parent,omitempty"`
	Depth   int    `json:"depth,omitempty"`
	GroupID string `json:"group_id,omitempty"` // checkpoints of several VMs at one cut
	Epoch   uint64 `json:"epoch,omitempty"`    // binds memory, disks and held packets
	Mode    string `json:"mode"`               // stop, buffer, cow, ...
	Engine  string `json:"engine"`             // uffd, bpf, none
	Writer  string `json:"writer,omitempty"`   // name and version of the program

	QEMU    QEMU    `json:"qemu"`
	Machine Machine `json:"machine"`

	Blocks      []Block    `json:"blocks"`
	DeviceState FileRef    `json:"device_state"`
	Pagemap     PagemapRef `json:"pagemap"`
	Segments    []Segment  `json:"segments"`
	Tags        *TagsRef   `json:"tags,omitempty"` // nil: no child can be made of it
	Stats       Stats      `json:"stats"`
	// Disks are the writable drives, in the order of QEMU's list.
	Disks []Disk `json:"disks,omitempty"`
	// Hot lists the pages written around the checkpoint, hottest first: the order
	// in which a lazy restore prefetches. At most MaxHotRuns.
	Hot HotRuns `json:"hot,omitempty"`
}

// QEMU identifies the binary that ran the VM.
type QEMU struct {
	Version    string `json:"version"` // 7.2.22
	Package    string `json:"package,omitempty"`
	BinaryPath string `json:"binary_path"`
	SHA256     string `json:"sha256,omitempty"` // of the binary, hex
}

// Machine is what it takes to build the VM again.
type Machine struct {
	Type     string `json:"type"` // versioned: pc-i440fx-7.2
	Accel    string `json:"accel"`
	CPUModel string `json:"cpu_model,omitempty"` // as QEMU resolved it, with its feature flags
	VCPUs    int    `json:"vcpus,omitempty"`
	UUID     string `json:"uuid,omitempty"`
	RTC      string `json:"rtc,omitempty"` // value of -rtc

	Argv     []string `json:"argv"`               // command line with argv[0], secrets redacted
	Redacted []string `json:"redacted,omitempty"` // what was redacted and has to be asked for again
	Env      []EnvVar `json:"env,omitempty"`      // allow-listed variables
	// Changes are arguments that bring the recorded command line up to the machine
	// as it was (hotplug, changed media), in the order to append them.
	Changes []string `json:"changes,omitempty"`

	UID    int    `json:"uid"`
	GID    int    `json:"gid"`
	Groups []int  `json:"groups,omitempty"`
	Cwd    string `json:"cwd,omitempty"`
	Root   string `json:"root,omitempty"`

	// LibvirtXML is the domain as libvirt described it when the checkpoint was taken;
	// empty for a VM that libvirt does not manage.
	LibvirtXML string `json:"libvirt_xml,omitempty"`

	// Facts are further observations by name, for people and later versions;
	// nothing in this version acts on one.
	Facts map[string]string `json:"facts,omitempty"`
}

// EnvVar is one environment variable.
type EnvVar struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Block is one RAMBlock. Its content is UsedBytes long, in pages of PageBytes.
type Block struct {
	Name       string `json:"name"`
	UsedBytes  uint64 `json:"used_bytes"`
	TotalBytes uint64 `json:"total_bytes"`
	// PageBytes is the unit in which the image stores the block: a power of two
	// from MinPageBytes to MaxPageBytes that divides UsedBytes. It need not be the
	// page size of the backing.
	PageBytes        uint64 `json:"page_bytes"`
	BackingPageBytes uint64 `json:"backing_page_bytes,omitempty"`
	GPA              int64  `json:"gpa"`     // guest physical address, -1 if unknown
	Backing          string `json:"backing"` // anonymous, memfd, shared-file, private-file, hugetlb
	FileType         string `json:"file_type,omitempty"`
	Path             string `json:"path,omitempty"` // backing file, for people
	Shared           bool   `json:"shared"`
	ReadOnly         bool   `json:"read_only"`
	Main             bool   `json:"main"` // guest RAM proper, as against ROM, VGA, pflash, tables
	// Ranges is where the guest sees the block, by guest physical address; none if
	// unknown or not mapped.
	Ranges []GPARange `json:"ranges,omitempty"`
}

// GPARange is a piece of a block in the guest's physical memory.
type GPARange struct {
	GPA    uint64 `json:"gpa"`
	Offset uint64 `json:"offset"` // into the block
	Bytes  uint64 `json:"bytes"`
}

// Pages is the number of pages of the block.
func (b Block) Pages() uint64 {
	if b.PageBytes == 0 {
		return 0
	}
	return b.UsedBytes / b.PageBytes
}

// FileRef names a file of the checkpoint with its size and the checksum of its
// whole content.
type FileRef struct {
	Name     string   `json:"name"`
	Bytes    uint64   `json:"bytes"`
	Checksum Checksum `json:"checksum"`
}

// PagemapRef names the pagemap. The checksum covers its head, and the head holds
// the checksums of the rest: whoever needs one page need not hash them all.
type PagemapRef struct {
	Name         string   `json:"name"`
	Bytes        uint64   `json:"bytes"`
	HeadBytes    uint64   `json:"head_bytes"`
	HeadChecksum Checksum `json:"head_checksum"`
}

// SegmentKind says how pages lie in a segment.
type SegmentKind string

const (
	SegmentRaw    SegmentKind = "raw"    // plain pages, nothing else
	SegmentFrames SegmentKind = "frames" // compressed frames
)

// Segment names one segment. It has no checksum of its own: each page and each
// frame in it has one.
type Segment struct {
	Name  string      `json:"name"`
	Bytes uint64      `json:"bytes"`
	Kind  SegmentKind `json:"kind"`
	// Owner is the checkpoint it was written for, if that is another one, and VM that
	// one's VM, if that is another one.
	Owner string `json:"owner,omitempty"`
	VM    string `json:"vm,omitempty"`
	// Pages is how many pages of this checkpoint lie in it. Only with FeatureChain.
	Pages uint64 `json:"pages,omitempty"`
}

// InheritedBytes is the size of the segments that were written for other checkpoints.
func (m *Manifest) InheritedBytes() (sum uint64) {
	for i := range m.Segments {
		if m.Segments[i].Owner != "" {
			sum += m.Segments[i].Bytes
		}
	}
	return sum
}

// Stats are the figures of one checkpoint. RAMBytes, Pages, ZeroPages and
// StoredBytes are set by Summary.Apply, the others by who took the checkpoint.
type Stats struct {
	PauseNS       int64  `json:"pause_ns"`
	ArmNS         int64  `json:"arm_ns"`
	DeviceStateNS int64  `json:"device_state_ns"`
	TotalNS       int64  `json:"total_ns"`
	RAMBytes      uint64 `json:"ram_bytes"`      // sum of the blocks' UsedBytes
	Pages         uint64 `json:"pages"`          // of all blocks
	ZeroPages     uint64 `json:"zero_pages"`     // recorded as zero, not stored
	CapturedPages uint64 `json:"captured_pages"` // saved by a fault, not by the scan
	StoredBytes   uint64 `json:"stored_bytes"`   // all files written for it but manifest and volumes
	// DiskBytes is what the volumes written for this checkpoint take.
	DiskBytes uint64 `json:"disk_bytes,omitempty"`
}

// PageRun is a run of pages of one block, in units of that block's PageBytes.
type PageRun struct {
	Block int    // index into Manifest.Blocks
	First uint64 // page
	Pages uint64
}

// End is the page after the run.
func (r PageRun) End() uint64 { return r.First + r.Pages }

func (r PageRun) String() string {
	return fmt.Sprintf("block %d pages %d-%d", r.Block, r.First, r.End()-1)
}
