package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Disk is a block device of the machine with what is in it.
type Disk struct {
	Name      string `json:"name"`           // -drive id, or the device's id, or its QOM path
	Device    string `json:"device"`         // backend name, "" with -blockdev
	QOMPath   string `json:"qom_path"`       // of the device that uses it, "" when none does
	Type      string `json:"type"`           // QOM type of that device
	Node      string `json:"node,omitempty"` // top node of the medium
	Driver    string `json:"driver,omitempty"`
	File      string `json:"file,omitempty"`
	Bytes     uint64 `json:"size_bytes,omitempty"` // that the guest sees
	Inserted  bool   `json:"inserted"`
	ReadOnly  bool   `json:"read_only"`
	Removable bool   `json:"removable"`
	Pflash    bool   `json:"pflash"`    // its content is a RAM block, which is the truth
	Temporary bool   `json:"temporary"` // snapshot=on: writes go to a nameless file that ends with QEMU
}

// Writable reports that the guest or QEMU may write to the medium.
func (d *Disk) Writable() bool { return d.Inserted && !d.ReadOnly }

type blockInfo struct {
	Device    string `json:"device"`
	QDev      string `json:"qdev"`
	Removable bool   `json:"removable"`
	Inserted  *struct {
		File     string `json:"file"`
		NodeName string `json:"node-name"`
		RO       bool   `json:"ro"`
		Drv      string `json:"drv"`
		Image    struct {
			Filename    string `json:"filename"`
			VirtualSize uint64 `json:"virtual-size"`
		} `json:"image"`
	} `json:"inserted"`
}

// temporaryImage matches what QEMU calls the overlay of snapshot=on.
var temporaryImage = regexp.MustCompile(`/vl\.[A-Za-z0-9]{6}\b`)

// Disks lists the block devices, empty drives included.
func (t *Target) Disks(ctx context.Context) ([]Disk, error) {
	var infos []blockInfo
	if err := t.QMP.Execute(ctx, "query-block", nil, &infos); err != nil {
		return nil, fmt.Errorf("query-block: %w", err)
	}
	out := make([]Disk, 0, len(infos))
	for _, b := range infos {
		d := Disk{Device: b.Device, Removable: b.Removable}
		if b.QDev != "" {
			d.QOMPath = b.QDev
			if !strings.HasPrefix(b.QDev, "/") {
				d.QOMPath = "/machine/peripheral/" + b.QDev
			}
			typ, err := qomGet[string](ctx, t.QMP, d.QOMPath, "type")
			if err != nil {
				return nil, fmt.Errorf("type of %s: %w", d.QOMPath, err)
			}
			d.Type = typ
			d.Pflash = strings.HasPrefix(typ, "cfi.pflash")
		}
		if i := b.Inserted; i != nil {
			d.Inserted, d.ReadOnly, d.Driver, d.Node, d.File = true, i.RO, i.Drv, i.NodeName, i.File
			d.Bytes = i.Image.VirtualSize
			if i.Image.Filename != "" && !strings.HasPrefix(i.Image.Filename, "json:") {
				d.File = i.Image.Filename
			}
			d.File = fileOf(d.File)
			d.Temporary = temporaryImage.MatchString(i.Image.Filename) || temporaryImage.MatchString(i.File)
		}
		for _, name := range []string{b.Device, b.QDev, d.Node} {
			if name != "" {
				d.Name = name
				break
			}
		}
		out = append(out, d)
	}
	return out, nil
}

// fileOf takes the file out of what QEMU calls an image that was opened with options
// which no file name can say, such as the secret of an encrypted one.
func fileOf(name string) string {
	text, ok := strings.CutPrefix(name, "json:")
	if !ok {
		return name
	}
	type node struct {
		Filename string          `json:"filename"`
		File     json.RawMessage `json:"file"`
	}
	for at := []byte(text); ; {
		var n node
		if json.Unmarshal(at, &n) != nil {
			return name // "file" is a node's name, or nothing
		}
		if n.Filename != "" {
			return n.Filename
		}
		at = n.File
	}
}

// passthrough reports that the guest speaks to the medium itself.
func (d *Disk) passthrough() bool {
	return slices.Contains([]string{"scsi-generic", "scsi-block"}, d.Type)
}

// diskRefusals names the drives that no checkpoint can hold, for what they are.
func diskRefusals(disks []Disk) []Refusal {
	var out []Refusal
	for i := range disks {
		d := &disks[i]
		switch {
		case d.Pflash || !d.Inserted:
		case d.passthrough():
			out = append(out, Refusal{Code: "passthrough-disk", Object: d.Name,
				Reason: fmt.Sprintf("%s hands SCSI commands to %s, whose state is not in the VM", d.Type, d.File),
				Advice: "use scsi-hd or virtio-blk on an image"})
		case d.Temporary && !d.ReadOnly:
			out = append(out, Refusal{Code: "temporary-disk", Object: d.Name,
				Reason: "its writes go to a temporary overlay (snapshot=on) that ends with QEMU, so a restored guest would find its disk without them",
				Advice: "give it a lasting image, or make it read-only (readonly=on)"})
		}
	}
	return out
}
