package export

import (
	"fmt"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/image"
)

// Disk is a writable drive of the machine that an exported state belongs to. Loaded
// beside any other content of its disks, a state destroys their file systems.
type Disk struct {
	Name string `json:"name"`
	Path string `json:"path"` // the image that the command line or the domain names
	// Method says where the content of the instant is: in the qcow2 chain at Volume
	// (backup), in the image at Path (overlay), in its internal snapshot Snapshot
	// (snapshot), nowhere (none).
	Method   image.DiskMethod `json:"method"`
	Volume   string           `json:"volume,omitempty"`
	Snapshot string           `json:"snapshot,omitempty"`
}

// Advice is what to do so that the image at Path holds the content of the instant.
func (d Disk) Advice() string {
	switch d.Method {
	case image.DiskBackup:
		return fmt.Sprintf("its content of that instant is %s: qemu-img convert it to the image", d.Volume)
	case image.DiskSnapshot:
		return fmt.Sprintf("its content of that instant is the image's internal snapshot: qemu-img snapshot -a %s", d.Snapshot)
	case image.DiskOverlay:
		return "the image must be as it was at that instant: nothing that was written to overlays since"
	}
	return "its content of that instant was left out of the checkpoint: the image must not have changed since"
}

// disks lists the drives of a checkpoint whose files lie in dir.
func disks(m *image.Manifest, dir string) []Disk {
	var out []Disk
	for _, d := range m.Disks {
		e := Disk{Name: d.Name, Path: d.Path, Method: d.Method, Snapshot: d.Snapshot}
		if len(d.Volumes) > 0 {
			e.Volume = filepath.Join(filepath.Dir(dir), image.DisksDirName, d.Volumes[0].Name)
		}
		out = append(out, e)
	}
	return out
}
