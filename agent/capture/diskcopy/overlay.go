package diskcopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// Overlay says where overlays are made.
type Overlay struct {
	Dir string // seen from here; "": each beside its image
	// Outside is where a file of QEMU's lies, seen from here.
	Outside func(path string) string
}

const (
	overlayLeast = 256 << 20 // free room for an overlay to begin with; a smaller disk wants no more than its size
	overlayLow   = 64 << 20  // left: the copy is given up, before the guest's writes fail
)

// overlayFile is where the overlay of a disk is to lie. What a QEMU that has ended left
// there is refused: it holds the last that its guest wrote.
func (s *Set) overlayFile(d *item) (path string, err error) {
	refuse := func(hint, format string, args ...any) (string, error) {
		return "", problem.New(problem.Refused, "make overlay", "disk "+d.src.Drive.Name, format, args...).WithHint("%s", hint)
	}
	image := d.src.Path
	if strings.Contains(image, ":") || d.src.Storage != "file" && d.src.Storage != "host_device" {
		return refuse("use --disks backup", "%s is neither a file nor a block device, and an overlay over it could not be committed by hand", image)
	}
	dir, name := s.c.Overlay.Dir, filepath.Base(image)
	if dir == "" && d.src.Storage == "host_device" {
		return refuse("name a directory with --overlay-dir, or use --disks backup", "%s is a block device, and there is no room beside it", image)
	}
	if dir == "" {
		dir = filepath.Dir(s.c.Overlay.Outside(image))
	}
	left, err := filepath.Glob(filepath.Join(escapeGlob(dir), escapeGlob(name)+".ckagent-*"))
	if err != nil {
		return "", err
	}
	for _, f := range left {
		if disk.IsOverlayName(f) {
			return refuse("if nothing has written to the image since, qemu-img commit -d "+f+" (with the VM off) completes it; else remove the file",
				"%s is left of a QEMU that ended: it holds what its guest wrote last", f)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", problem.New(problem.Failed, "make overlay", dir, "%w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < min(overlayLeast, d.src.Bytes) {
		return refuse("make room, or name another directory with --overlay-dir",
			"%s has %d MiB free, and what the guest writes meanwhile has to go there", dir, free>>20)
	}
	return filepath.Join(dir, disk.OverlayName(name, s.c.Txn.ID())), nil
}

// escapeGlob has a name stand for itself in a pattern.
func escapeGlob(name string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(name)
}

// addOverlay makes the overlay of a disk and lends it to QEMU, without a backing file:
// the switch gives it one.
func (s *Set) addOverlay(ctx context.Context, d *item) error {
	f, err := os.OpenFile(d.overlay, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return problem.New(problem.Failed, "make overlay", d.overlay, "%w", err)
	}
	d.above = f
	// Whoever may open the image may have to open this, should QEMU die.
	var st unix.Stat_t
	if err := unix.Stat(s.c.Overlay.Outside(d.src.Path), &st); err != nil {
		return problem.New(problem.Failed, "make overlay", d.overlay, "%w", err)
	}
	if err := errors.Join(f.Chown(int(st.Uid), int(st.Gid)), f.Chmod(os.FileMode(st.Mode&0o660))); err != nil {
		return problem.New(problem.Failed, "make overlay", d.overlay, "%w", err)
	}
	// QEMU's name of the image: it is for those who see the files as QEMU does.
	below := d.src.Format
	if below == d.src.Storage { // a device on the protocol itself
		below = "raw"
	}
	if err := format(ctx, f, d.src.Path, below, d.src.Bytes); err != nil {
		return err
	}
	var more map[string]any
	if d.src.File != "" {
		luks, err := qcow2.ReadLUKS(s.c.Overlay.Outside(d.src.Path))
		if err == nil {
			err = qcow2.Encrypt(f, luks)
		}
		if err != nil {
			return problem.New(problem.Failed, "encrypt overlay", d.overlay, "%w", err)
		}
		more = map[string]any{"encrypt": map[string]any{"format": "luks", "key-secret": d.src.KeySecret}}
	}
	// What the guest makes durable there is as durable as the file's name.
	if err := errors.Join(f.Sync(), fsys.OS{}.SyncDir(filepath.Dir(d.overlay))); err != nil {
		return problem.New(problem.Failed, "make overlay", d.overlay, "%w", err)
	}
	return s.lend(ctx, disk.OverlayNode(d.n), disk.OverlayOpaque(d.n, d.overlay), f, more)
}

// frozen is the node that holds a disk's instant, to which nobody writes any more. Of an
// encrypted image it is the file, whose size is known only now.
func (s *Set) frozen(ctx context.Context, d *item) (node string, err error) {
	if d.src.File == "" {
		return d.src.Image, nil
	}
	g, err := disk.Read(ctx, s.c.QMP)
	if err != nil {
		return "", err
	}
	file := g.Nodes[d.src.File]
	if file == nil {
		return "", problem.New(problem.Busy, "copy", "disk "+d.src.Drive.Name, "its node %s was taken away by somebody", d.src.File)
	}
	return file.Name, s.addVolume(ctx, d, file.Image.VirtualSize)
}

// roomy reports whether the overlays can still grow.
func (s *Set) roomy() error {
	for _, d := range s.items {
		var st unix.Statfs_t
		if d.above == nil || unix.Fstatfs(int(d.above.Fd()), &st) != nil {
			continue
		}
		if free := st.Bavail * uint64(st.Bsize); free < overlayLow {
			return problem.New(problem.Busy, "copy", "disk "+d.src.Drive.Name, "the guest has left %d MiB free beside its overlay", free>>20).
				WithHint("make room in %s, or raise --disk-speed", filepath.Dir(d.overlay))
		}
	}
	return nil
}

// switchAction is what the transaction of the pause has to do for a disk.
func switchAction(d *item) map[string]any {
	return map[string]any{"node": d.src.Image, "overlay": disk.OverlayNode(d.n)}
}

// dropOverlays removes what is left of overlays when nothing of ours is in QEMU: those
// that it never knew. An overlay in use stays, whatever becomes of us.
func (s *Set) dropOverlays() error {
	var errs []error
	for _, d := range s.items {
		if d.above == nil || s.inGraph {
			continue
		}
		if err := os.Remove(d.overlay); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove an overlay: %w", err))
		}
	}
	return errors.Join(errs...)
}
