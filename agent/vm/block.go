package vm

import (
	"context"
	"fmt"
	"strings"
)

// RAMBlock is one block of guest memory as QEMU keeps it and where it lies in
// QEMU's address space. All sizes are bytes.
type RAMBlock struct {
	Name       string     `json:"name"`        // idstr, as in the migration stream
	UsedBytes  uint64     `json:"used_bytes"`  // what the guest has and a checkpoint saves
	TotalBytes uint64     `json:"total_bytes"` // what is mapped; larger for resizable blocks (ACPI tables)
	HVA        uint64     `json:"hva"`         // start in QEMU's address space
	GPA        int64      `json:"gpa"`         // guest-physical address of the block's first byte; -1 when not mapped now
	Ranges     []GPARange `json:"ranges,omitempty"`
	PageBytes  uint64     `json:"page_bytes"` // 4096, or the huge page size of hugetlbfs
	Backing    Backing    `json:"backing"`
	FileType   string     `json:"file_type,omitempty"` // file system: tmpfs, ext4, hugetlbfs
	FilePath   string     `json:"file_path,omitempty"` // as QEMU sees it
	Shared     bool       `json:"shared"`              // MAP_SHARED
	ReadOnly   bool       `json:"read_only"`           // the guest cannot write it (ROM), as far as is known
	Main       bool       `json:"main"`                // guest RAM proper (a memory backend), as against ROM, VGA, pflash, tables
	Reported   bool       `json:"reported,omitempty"`  // a page of it may be discarded and used again without a trace
	How        string     `json:"how"`                 // what found it, see the How constants
	VMAs       []VMA      `json:"vmas,omitempty"`      // adjacent, covering [HVA, HVA+TotalBytes)
}

// GPARange is a piece of a block as it appears in the guest's physical memory.
type GPARange struct {
	GPA    uint64 `json:"gpa"`
	Offset uint64 `json:"offset"` // into the block
	Bytes  uint64 `json:"bytes"`
}

// What found a block's address; every one of them is checked by size,
// permissions and an unbroken mapping that no other block lies in.
const (
	HowMonitor = "ramblock" // `info ramblock` says it (QEMU 8.2 and later)
	HowGPA     = "gpa2hva"  // mapped in the guest, address asked of QEMU
	HowRecord  = "record"   // QEMU's own record of the block, read from its heap
	HowSize    = "size"     // the only unclaimed RAM mapping of this size
	HowContent = "content"  // read-only blocks of one size with equal content: interchangeable
)

// romName reports whether a block's name says that the guest cannot write it:
// option ROMs and the blobs of the firmware configuration device.
func romName(name string) bool {
	return strings.HasSuffix(name, ".rom") || strings.HasPrefix(name, "/rom@")
}

// memdev is an element of query-memdev.
type memdev struct {
	ID   string `json:"id"`
	Size uint64 `json:"size"`
}

// mainBlocks names the blocks that belong to memory backends. A block carries its
// backend's id, the backend's path with old machine types, or the id behind a
// device's path (ivshmem).
func mainBlocks(ctx context.Context, q Monitor, blocks []RAMBlock) (map[string]bool, error) {
	var devs []memdev
	if err := q.Execute(ctx, "query-memdev", nil, &devs); err != nil {
		return nil, fmt.Errorf("query-memdev: %w", err)
	}
	out := make(map[string]bool)
	for _, d := range devs {
		for i := range blocks {
			if n := blocks[i].Name; n == d.ID || n == "/objects/"+d.ID || strings.HasSuffix(n, "/"+d.ID) && blocks[i].TotalBytes == d.Size {
				out[n] = true
			}
		}
	}
	return out, nil
}
