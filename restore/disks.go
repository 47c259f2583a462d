package restore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/restore/overlay"
	"github.com/ckagent/ckagent/restore/plan"
)

// DiskMode says which disks a restored guest gets.
type DiskMode string

const (
	// DisksCheckpoint: those of the checkpoint's instant, in files of its own. The
	// default.
	DisksCheckpoint DiskMode = "checkpoint"
	// DisksOriginal: the original images, if nobody wrote to them since.
	DisksOriginal DiskMode = "original"
	// DisksAsIs: what the command line names, whatever it holds by now. The guest's
	// memory may know a file system that is not there any more.
	DisksAsIs DiskMode = "as-is"
)

// ParseDiskMode reads a mode as the command line has it.
func ParseDiskMode(s string) (DiskMode, error) {
	switch m := DiskMode(s); m {
	case DisksCheckpoint, DisksOriginal, DisksAsIs:
		return m, nil
	}
	return "", problem.New(problem.Usage, "restore", "--disks "+s, "there is no such mode").
		WithHint("checkpoint, original or as-is")
}

// DiskRoot is where restored VMs have their disks unless told otherwise: they
// outlive the host's boot, and no user but QEMU's can open them. It lies beside the
// store and not inside, which only root may enter.
const DiskRoot = "/var/lib/ckagent-restored"

// keeper keeps a checkpoint for those who need its volumes (store.Image).
type keeper interface {
	Lend(ctx context.Context, pid int, startTicks uint64) (takeBack func() error, err error)
	HoldFor(ctx context.Context, path string) (release func() error, err error)
}

// DiskResult is a disk of a restored VM.
type DiskResult struct {
	Name    string `json:"name"`
	Path    string `json:"path"`              // what the guest writes to from now on
	Backing string `json:"backing,omitempty"` // volume of the store that it needs
}

// nameDisks chooses where the disks go. The directory is new: what an earlier
// restore of the same checkpoint made is a disk that somebody may need.
func (o *Options) nameDisks(m *image.Manifest) {
	if o.Disks == "" {
		o.Disks = DisksCheckpoint
	}
	if o.DiskDir != "" || !m.HasDisks() || o.Disks != DisksCheckpoint {
		return
	}
	var b [4]byte
	rand.Read(b[:]) // never fails
	o.DiskDir = filepath.Join(DiskRoot, cleanName(m.VM), m.ID+"-"+hex.EncodeToString(b[:]))
}

// planDisks is what the plan needs to know about disks.
func planDisks(m *image.Manifest, mode DiskMode) []plan.Disk {
	if mode != DisksCheckpoint {
		return nil
	}
	out := make([]plan.Disk, len(m.Disks))
	for i, d := range m.Disks {
		out[i] = plan.Disk{Name: d.Name, Device: d.Device, Node: d.Node, Path: d.Path, Wrapped: d.Content != image.ContentGuest}
	}
	return out
}

// judgeDisks refuses what would run a guest on disks of another instant.
func judgeDisks(m *image.Manifest, mode DiskMode) error {
	if mode == DisksAsIs {
		return nil
	}
	var out []string
	for _, d := range m.Disks {
		if d.Method == image.DiskNone {
			out = append(out, d.Name+" ("+d.Path+")")
		}
	}
	if len(out) == 0 {
		return nil
	}
	return problem.New(problem.Refused, "restore", m.ID, "the checkpoint was taken without the content of %s: memory restored against a disk of a later time destroys file systems", strings.Join(out, ", ")).
		WithHint("take checkpoints with --disks backup; --disks as-is restores it all the same, if you know that the guest wrote nothing since")
}

// volumeDir is where the volumes of the opened checkpoint lie.
func (x *run) volumeDir() string { return filepath.Join(filepath.Dir(x.r.Dir()), image.DisksDirName) }

// disks makes the guest's disks, before QEMU is started and after it was made sure
// that the original is dead.
func (x *run) disks(ctx context.Context) error {
	switch {
	case !x.m.HasDisks():
		return nil
	case x.o.Disks == DisksOriginal:
		return x.compareOriginals(ctx)
	case x.o.Disks == DisksAsIs:
		for _, d := range x.m.Disks {
			x.note("disk %s is used as it is now (%s), not as it was when the checkpoint was taken", d.Name, d.Path)
		}
		return nil
	}
	if err := overlay.Check(ctx, x.volumeDir(), x.m); err != nil {
		return err
	}
	if err := x.diskDirs(); err != nil {
		return err
	}
	// Who runs without root's rights cannot open the store's files.
	foreign := x.plan.UID != os.Geteuid()
	g, gctx := errgroup.WithContext(ctx)
	failed := make([]error, len(x.plan.Disks))
	for i, f := range x.plan.Disks {
		s, copied, err := x.spec(x.m.Disks[i], f)
		if err != nil {
			return errors.Join(err, g.Wait())
		}
		copied = copied || foreign
		res := DiskResult{Name: f.Name, Path: f.Path}
		if !copied {
			res.Backing = s.Backing
			if err := x.hold(ctx, f.Path); err != nil {
				return errors.Join(err, g.Wait())
			}
		}
		x.res.Disks = append(x.res.Disks, res)
		create := overlay.Create
		if copied {
			create = overlay.Copy
		}
		g.Go(func() error {
			failed[i] = create(gctx, s)
			return failed[i]
		})
	}
	err := g.Wait()
	for i, f := range x.plan.Disks {
		if errors.Is(failed[i], os.ErrExist) { // somebody else made it just now: not ours to remove
			x.dir.state.Disks = slices.DeleteFunc(x.dir.state.Disks, func(path string) bool { return path == f.Path })
		}
	}
	if err != nil {
		return err
	}
	if foreign {
		x.note("the disks were copied out of the store: QEMU runs as uid %d, which may not read it", x.plan.UID)
	}
	return nil
}

// disksToMake names what disks is about to make, which must not be there: it is noted
// before it is made, so that nothing of a restore that is killed stays for ever, and
// what is noted will be removed if the guest never runs.
func (x *run) disksToMake() (files []string, dir string, err error) {
	if len(x.plan.Disks) == 0 {
		return nil, "", nil
	}
	for _, f := range x.plan.Disks {
		if _, err := os.Lstat(f.Path); !errors.Is(err, os.ErrNotExist) {
			if err == nil {
				return nil, "", overlay.Exists(f.Path)
			}
			return nil, "", problem.New(problem.Failed, "make disk", f.Path, "%w", err)
		}
		files = append(files, f.Path)
	}
	if _, err := os.Lstat(x.o.DiskDir); errors.Is(err, os.ErrNotExist) {
		dir = x.o.DiskDir
	}
	return files, dir, nil
}

// spec describes the file for one disk, and whether it must be a copy.
func (x *run) spec(d image.Disk, f plan.DiskFile) (s overlay.Spec, copied bool, err error) {
	s = overlay.Spec{Path: f.Path, Format: "qcow2", SizeBytes: d.SizeBytes, UID: x.plan.UID, GID: x.plan.GID}
	switch d.Method {
	case image.DiskBackup:
		s.Backing = filepath.Join(x.volumeDir(), d.Volumes[0].Name)
		h, err := qcow2.ReadHeader(s.Backing)
		if err != nil {
			return s, false, problem.New(problem.Integrity, "read volume", s.Backing, "%w", err)
		}
		s.SizeBytes = h.SizeBytes
		if d.Content == image.ContentQCOW2 {
			s.SizeBytes += growth(d.SizeBytes)
		}
		if f.Direct && !overlay.DirectIO(filepath.Dir(s.Backing)) {
			copied = true // QEMU opens the whole chain the same way
		}
	case image.DiskOverlay, image.DiskSnapshot:
		s.Backing, s.Format = d.Path, d.Format
		if d.Method == image.DiskSnapshot {
			s.Snapshot, copied = d.Snapshot, true
		}
		if _, err := os.Stat(d.Path); err != nil {
			return s, false, problem.New(problem.Refused, "restore", "disk "+d.Name, "its content is kept in the original image, which cannot be opened: %w", err).
				WithHint("put %s back; checkpoints taken with --disks backup have their disks in the store", d.Path)
		}
	default:
		return s, false, problem.New(problem.Refused, "restore", x.m.ID, "disk %s: its content is kept in a way this version does not know (%s)", d.Name, d.Method).
			WithHint("a newer ckagent may: it was taken by %s", x.m.Writer)
	}
	return s, copied, nil
}

// growth is the room that a qcow2 image inside another one may still come to need:
// everything the guest has not written yet, with the tables for it.
func growth(sizeBytes uint64) uint64 { return sizeBytes + sizeBytes/1024 + 64<<20 }

// diskDirs makes the directories for the disks. Those that are ours are for QEMU's
// user alone.
func (x *run) diskDirs() error {
	for _, f := range x.plan.Disks {
		dir := filepath.Dir(f.Path)
		if dir == x.o.DiskDir {
			if err := x.makeDiskDir(dir); err != nil {
				return err
			}
		}
		if f.Direct && !overlay.DirectIO(dir) {
			return problem.New(problem.Refused, "make disk", f.Path, "drive %s is opened past the page cache (cache=none or the like), and the file system of %s cannot do that", f.Name, dir).
				WithHint("name a directory on another file system with --disk-dir")
		}
	}
	return nil
}

func (x *run) makeDiskDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	fail := func(err error) error {
		return problem.New(problem.Failed, "make disk directory", dir, "%w", err).
			WithHint("--disk-dir DIR names another place for the restored VM's disks")
	}
	// Others may pass through the upper ones, but not look around.
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return fail(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fail(err)
	}
	if x.plan.UID == os.Geteuid() {
		return nil
	}
	if err := os.Chown(dir, x.plan.UID, x.plan.GID); err != nil {
		return fail(err)
	}
	return nil
}

// compareOriginals makes sure that every original image is still what it was.
func (x *run) compareOriginals(ctx context.Context) error {
	for _, d := range x.m.Disks {
		refuse := func(format string, args ...any) error {
			return problem.New(problem.Refused, "restore", "disk "+d.Name, format, args...).
				WithHint("without --disks original the guest gets the disk of the checkpoint, and %s is not touched", d.Path)
		}
		if d.Method != image.DiskBackup {
			return refuse("there is no copy to compare %s with", d.Path)
		}
		if err := overlay.Check(ctx, x.volumeDir(), x.m); err != nil {
			return err
		}
		format := d.Format
		if d.Content != image.ContentGuest {
			format = "raw" // encrypted: as it lies there
		}
		same, err := overlay.Same(ctx, d.Path, format, filepath.Join(x.volumeDir(), d.Volumes[0].Name), "qcow2")
		if err != nil {
			return refuse("whether %s was written to since cannot be told: %w", d.Path, err)
		}
		if !same {
			return refuse("%s was written to after the checkpoint", d.Path)
		}
	}
	return nil
}

// hold keeps the checkpoint for a disk that is about to be made.
func (x *run) hold(ctx context.Context, path string) error {
	if x.keep == nil {
		return nil
	}
	release, err := x.keep.HoldFor(ctx, path)
	if err == nil {
		x.giveBack = append(x.giveBack, release)
	}
	return err
}

// lend keeps the checkpoint for the QEMU that was started.
func (x *run) lend(ctx context.Context) error {
	if x.keep == nil || len(x.diskPaths()) == 0 {
		return nil
	}
	takeBack, err := x.keep.Lend(ctx, x.q.child.Pid, x.q.started)
	if err == nil {
		x.giveBack = append(x.giveBack, takeBack)
	}
	return err
}

// give gives back everything that keeps the checkpoint.
func (x *run) give() error {
	var errs []error
	for _, f := range x.giveBack {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// diskPaths are the files that still need the store.
func (x *run) diskPaths() (paths []string) {
	for _, d := range x.res.Disks {
		if d.Backing != "" {
			paths = append(paths, d.Path)
		}
	}
	return paths
}

// flatten makes the disks independent of the store, and waits for it if the caller
// waits for the drain as well.
func (x *run) flatten(ctx context.Context, c *qmp.Client) error {
	paths := x.diskPaths()
	if !x.o.FlattenDisks || len(paths) == 0 {
		return nil
	}
	return overlay.Stream(ctx, c, paths, x.o.BytesPerSecond)
}

// awaitFlat has the disks made independent once the memory is in.
func (x *run) awaitFlat(ctx context.Context) error {
	paths := x.diskPaths()
	if !x.o.FlattenDisks || len(paths) == 0 {
		return nil
	}
	c, err := qmp.Dial(ctx, qmp.Endpoint{Network: "unix", Address: x.plan.QMPPath, FD: -1, PID: x.q.proc.PID})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := x.flatten(ctx, c); err != nil {
		return err
	}
	if err := overlay.AwaitStreams(ctx, c, paths, x.o.OnFlatten); err != nil {
		return err
	}
	for i := range x.res.Disks {
		x.res.Disks[i].Backing = ""
	}
	return nil
}
