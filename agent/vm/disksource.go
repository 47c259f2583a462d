package vm

import (
	"context"
	"fmt"
	"slices"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// DiskSource is a medium that a checkpoint has to hold, with the drive it is in.
type DiskSource struct {
	disk.Source
	Drive Disk
	// KeySecret is the id of the secret object that opens an encrypted image; empty for
	// others.
	KeySecret string
}

// Record describes the disk for a manifest, but for where its content is.
func (s *DiskSource) Record() image.Disk {
	d := s.Drive
	content := image.ContentGuest
	switch {
	case s.File != "" && s.Format == "luks":
		content = image.ContentLUKS
	case s.File != "":
		content = image.ContentQCOW2
	}
	return image.Disk{Name: d.Name, Device: d.Device, Node: s.Root, QOMPath: d.QOMPath, Type: d.Type,
		Format: s.Format, Path: s.Path, SizeBytes: s.Bytes, Content: content}
}

// DiskSources lists the media that a checkpoint has to hold, and why some of the
// machine's drives cannot be part of one.
func (t *Target) DiskSources(ctx context.Context) ([]DiskSource, []Refusal, error) {
	drives, err := t.Disks(ctx)
	if err != nil {
		return nil, nil, err
	}
	refused := diskRefusals(drives)
	g, err := disk.Read(ctx, t.QMP)
	if err != nil {
		return nil, nil, err
	}
	find := func(path string) *Disk {
		k := slices.IndexFunc(drives, func(d Disk) bool { return d.QOMPath == path })
		if k < 0 {
			return nil
		}
		return &drives[k]
	}
	g.Drives = slices.DeleteFunc(g.Drives, func(d disk.Drive) bool {
		k := find(d.QOMPath)
		return k == nil || k.Pflash || k.Temporary || k.passthrough()
	})
	sources, why := g.Sources()
	for _, r := range why {
		refused = append(refused, Refusal(r))
	}
	var out []DiskSource
	for _, s := range sources {
		d := DiskSource{Source: s, Drive: *find(s.Device)}
		if s.File != "" {
			d.KeySecret = t.keySecret(&d)
			refused = append(refused, t.refuseEncrypted(&d)...)
		}
		out = append(out, d)
	}
	if len(out) > 0 && !t.Version.AtLeast(7, 1) {
		refused = append(refused, Refusal{Code: "qemu-version", Object: out[0].Drive.Name,
			Reason: "QEMU " + t.Version.String() + " cannot keep a failing copy of a disk away from the guest",
			Advice: "use QEMU 7.1 or later, or leave disks out with --disks none"})
	}
	if len(out) > 0 && !t.Version.AtLeast(9, 0) {
		// Making a block node while a device of such a thread is busy ends QEMU 7.2
		// now and then ("qemu_mutex_unlock_impl: Operation not permitted"), whether the
		// machine runs or is stopped. 9.0 did away with the lock it trips over.
		threads, err := t.ioThreads(ctx)
		if err != nil {
			return nil, nil, err
		}
		if len(threads) > 0 {
			refused = append(refused, Refusal{Code: "disk-iothread", Object: threads[0],
				Reason: "QEMU " + t.Version.String() + " may end when a disk that is served by an I/O thread is copied",
				Advice: "use QEMU 9.0 or later, serve disks without iothread=, or leave disks out with --disks none"})
		}
	}
	return out, refused, nil
}

// refuseEncrypted says why an encrypted image cannot be copied as it lies.
func (t *Target) refuseEncrypted(d *DiskSource) []Refusal {
	if !t.Overlays {
		return []Refusal{{Code: "encrypted-disk", Object: d.Drive.Name,
			Reason: "it is encrypted (" + d.Path + "), and what QEMU reads of it is plain: the store would hold the guest's data in the clear",
			Advice: "use --disks overlay, which copies the image as it lies, encrypted; or leave disks out with --disks none"}}
	}
	if d.KeySecret == "" {
		return []Refusal{{Code: "encrypted-disk", Object: d.Drive.Name,
			Reason: "no option of QEMU's command line says which secret opens it, and an overlay without one would hold the guest's data in the clear",
			Advice: "name the drive on the command line, with key-secret or encrypt.key-secret"}}
	}
	return nil
}

// keySecret finds the secret of an encrypted image on the command line.
func (t *Target) keySecret(d *DiskSource) string {
	for i := range t.Options {
		o := &t.Options[i]
		if o.Name != "drive" && o.Name != "blockdev" {
			continue
		}
		kv, err := o.KeyVal()
		if err != nil {
			continue
		}
		get := func(key string) string { v, _ := kv.Get(key); return v }
		if o.Name == "drive" && (d.Drive.Device == "" || get("id") != d.Drive.Device) || o.Name == "blockdev" && get("node-name") != d.Image {
			continue
		}
		for _, key := range []string{"encrypt.key-secret", "key-secret"} {
			if v := get(key); v != "" {
				return v
			}
		}
	}
	return ""
}

// ioThreads names the machine's I/O threads.
func (t *Target) ioThreads(ctx context.Context) ([]string, error) {
	var threads []struct {
		ID string `json:"id"`
	}
	if err := t.QMP.Execute(ctx, "query-iothreads", nil, &threads); err != nil {
		return nil, fmt.Errorf("query-iothreads: %w", err)
	}
	var ids []string
	for _, th := range threads {
		ids = append(ids, th.ID)
	}
	return ids, nil
}

// TakeOutLeftovers removes what an earlier checkpoint left in the block graph. The
// caller makes sure that no other ckagent works on the VM.
func (t *Target) TakeOutLeftovers(ctx context.Context) (disk.Swept, error) {
	g, err := disk.Read(ctx, t.QMP)
	if err != nil || !g.Leftovers() {
		return disk.Swept{}, err
	}
	return disk.Sweep(ctx, t.QMP, false)
}
