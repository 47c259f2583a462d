package image

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// FeatureDisks is required of the reader of a checkpoint with disks: memory
// restored without them, or against disks of another time, destroys file systems.
const FeatureDisks = "disks"

// DisksDirName is the directory of a VM's volumes, beside its checkpoints. A
// volume outlives the checkpoint it was written for while another builds on it.
const DisksDirName = "disks"

// Limits of what a manifest says about disks.
const (
	MaxDisks       = 1024
	MaxVolumes     = 64      // in one chain
	MaxDiskBytes   = 1 << 60 // 1 EiB, of one disk
	maxImagePath   = 4096
	maxDiskNameLen = 1024 // QOM paths are longer than ids
)

// DiskMethod says where a disk's content of the stopped instant is.
type DiskMethod string

const (
	DiskBackup   DiskMethod = "backup"   // in Volumes, in the store
	DiskOverlay  DiskMethod = "overlay"  // in the image at Path, which stopped being written at that instant
	DiskSnapshot DiskMethod = "snapshot" // in the image at Path, as its internal snapshot Snapshot
	DiskNone     DiskMethod = "none"     // nowhere: it was left out, as asked for
)

// DiskContent says what the bytes of a disk's volumes are.
type DiskContent string

const (
	ContentGuest DiskContent = "raw"   // what the guest saw
	ContentLUKS  DiskContent = "luks"  // a LUKS container, to be opened by driver luks
	ContentQCOW2 DiskContent = "qcow2" // an encrypted qcow2 image, to be opened by driver qcow2
)

// Disk is one writable drive of the machine as it was at the stopped instant.
type Disk struct {
	Name string `json:"name"` // drive id, device id or QOM path; unique
	// Device is the name of the backend that -drive and its short forms make,
	// empty with -blockdev.
	Device string `json:"device,omitempty"`
	// Node is the top node of the drive's medium. Names that begin with "#" are
	// QEMU's own and mean nothing to another process.
	Node    string `json:"node,omitempty"`
	QOMPath string `json:"qom_path,omitempty"` // of the device that uses it
	Type    string `json:"type,omitempty"`     // of that device: virtio-blk-pci
	Format  string `json:"format"`             // driver of the original image: qcow2, raw
	Path    string `json:"path"`               // of the original image, as QEMU names it

	SizeBytes uint64      `json:"size_bytes"` // that the guest saw
	Method    DiskMethod  `json:"method"`
	Content   DiskContent `json:"content"`
	// Volumes is the chain, the newest first; each but the last is backed by the
	// one after it.
	Volumes  []Volume `json:"volumes"`
	Snapshot string   `json:"snapshot,omitempty"`
}

// Volume is one qcow2 file in the directory of a VM's volumes.
type Volume struct {
	Name     string   `json:"name"`  // checkpoint it was written for, "-", number of the disk, ".qcow2"
	Bytes    uint64   `json:"bytes"` // of the file
	Checksum Checksum `json:"checksum"`
}

var volumeName = regexp.MustCompile(`^[0-9]{8}T[0-9]{9}-[0-9a-f]{8}-[0-9]{1,4}\.qcow2$`)

// VolumeName is the name of the volume that a checkpoint writes for its n-th disk.
func VolumeName(id string, n int) string { return fmt.Sprintf("%s-%d.qcow2", id, n) }

// VolumeOwner is the id of the checkpoint that a volume was written for; ok is
// false for names that no volume has.
func VolumeOwner(name string) (id string, ok bool) {
	if !volumeName.MatchString(name) {
		return "", false
	}
	return name[:strings.LastIndexByte(name, '-')], true
}

// HasDisks reports whether the manifest speaks of disks.
func (m *Manifest) HasDisks() bool { return len(m.Disks) > 0 }

// VolumeNames lists the volumes of all chains, each once.
func (m *Manifest) VolumeNames() []string {
	seen := map[string]bool{}
	var out []string
	for _, d := range m.Disks {
		for _, v := range d.Volumes {
			if !seen[v.Name] {
				seen[v.Name] = true
				out = append(out, v.Name)
			}
		}
	}
	return out
}

func (m *Manifest) validateDisks() error {
	if len(m.Disks) > MaxDisks {
		return fmt.Errorf("%d disks: more than %d", len(m.Disks), MaxDisks)
	}
	needs := false
	for _, f := range m.Requires {
		needs = needs || f == FeatureDisks
	}
	if m.HasDisks() != needs {
		return fmt.Errorf("%d disks, but requires %q", len(m.Disks), m.Requires)
	}
	names := map[string]bool{}
	sizes := map[string]Volume{}
	var written uint64
	for i := range m.Disks {
		d := &m.Disks[i]
		if err := d.validate(); err != nil {
			return fmt.Errorf("disk %d (%.60q): %w", i, d.Name, err)
		}
		if names[d.Name] {
			return fmt.Errorf("disk %.60q appears twice", d.Name)
		}
		names[d.Name] = true
		for k, v := range d.Volumes {
			if _, twice := sizes[v.Name]; twice {
				return fmt.Errorf("disk %.60q: volume %s is named twice", d.Name, v.Name)
			}
			sizes[v.Name] = v
			if owner, _ := VolumeOwner(v.Name); k == 0 && owner != m.ID {
				return fmt.Errorf("disk %.60q: its newest volume is of checkpoint %s", d.Name, owner)
			}
			if k == 0 {
				written += v.Bytes
			}
		}
	}
	if m.Stats.DiskBytes != written {
		return fmt.Errorf("%d bytes of disks written: the volumes have %d", m.Stats.DiskBytes, written)
	}
	return nil
}

func (d *Disk) validate() error {
	for _, f := range []struct {
		what, value string
		limit       int
		empty       bool
	}{
		{"name", d.Name, maxDiskNameLen, false}, {"device", d.Device, maxDiskNameLen, true}, {"node", d.Node, maxDiskNameLen, true},
		{"qom_path", d.QOMPath, maxDiskNameLen, true}, {"path", d.Path, maxImagePath, true}, {"snapshot", d.Snapshot, maxDiskNameLen, true},
	} {
		if f.value == "" && !f.empty || len(f.value) > f.limit || !utf8.ValidString(f.value) || strings.ContainsRune(f.value, 0) {
			return fmt.Errorf("bad %s %.80q", f.what, f.value)
		}
	}
	if !validWord(d.Format, false) || !validWord(d.Type, true) {
		return fmt.Errorf("bad format %.40q or type %.40q", d.Format, d.Type)
	}
	if d.SizeBytes > MaxDiskBytes {
		return fmt.Errorf("%d bytes: more than %d", d.SizeBytes, uint64(MaxDiskBytes))
	}
	switch d.Content {
	case ContentGuest, ContentLUKS, ContentQCOW2:
	default:
		return fmt.Errorf("unknown content %.40q", d.Content)
	}
	if len(d.Volumes) > MaxVolumes {
		return fmt.Errorf("a chain of %d volumes: more than %d", len(d.Volumes), MaxVolumes)
	}
	for _, v := range d.Volumes {
		if _, ok := VolumeOwner(v.Name); !ok {
			return fmt.Errorf("volume name %.80q is not allowed", v.Name)
		}
		if v.Bytes == 0 || v.Bytes > MaxDiskBytes {
			return fmt.Errorf("volume %s of %d bytes", v.Name, v.Bytes)
		}
	}
	switch d.Method {
	case DiskBackup:
		if len(d.Volumes) == 0 {
			return errors.New("method backup without a volume")
		}
	case DiskOverlay, DiskSnapshot, DiskNone:
		if len(d.Volumes) != 0 {
			return fmt.Errorf("method %s with volumes", d.Method)
		}
	default:
		return fmt.Errorf("unknown method %.40q", d.Method)
	}
	if (d.Method == DiskSnapshot) != (d.Snapshot != "") {
		return fmt.Errorf("method %s with snapshot %.40q", d.Method, d.Snapshot)
	}
	return nil
}
