package restore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/qcow2"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore/plan"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// copyDisks writes the disks of a stopped machine into the store, by qemu-img and
// none of the capture's code.
func copyDisks(t *testing.T, st *store.Store, disks ...image.Disk) func(m *image.Manifest) {
	return func(m *image.Manifest) {
		t.Helper()
		dir := filepath.Join(st.Dir(), "vms", m.VM, image.DisksDirName)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for i, d := range disks {
			name := image.VolumeName(m.ID, i)
			out, err := exec.CommandContext(t.Context(), "qemu-img", "convert", "-U", "-f", d.Format, "-O", "qcow2", d.Path, filepath.Join(dir, name)).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			n, sum, err := image.SumFile(t.Context(), fsys.OS{}, filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			d.Method, d.Content, d.SizeBytes = image.DiskBackup, image.ContentGuest, 320<<20
			d.Volumes = []image.Volume{{Name: name, Bytes: n, Checksum: sum}}
			m.Disks = append(m.Disks, d)
			m.Stats.DiskBytes += n
		}
		m.Requires = append(m.Requires, image.FeatureDisks)
	}
}

// morgue is a dead machine with two checkpoints of a disk that its guest wrote to in
// between; nothing was written after the second.
type morgue struct {
	v            *vmtest.VM
	st           *store.Store
	older, newer string
	disk         string // the original image
}

func newMorgue(t *testing.T, cfg vmtest.Config, disk image.Disk, path string) *morgue {
	t.Helper()
	d := &morgue{st: testStore(t), disk: path}
	d.v = vmtest.Start(t, cfg)
	if path == "" {
		d.disk = d.v.Config().Disks[0].Path
	}
	disk.Path = d.disk
	take := func() string {
		d.v.WaitLog(t, 120)
		return takeCheckpoint(t, d.v, d.st, copyDisks(t, d.st, disk))
	}
	d.older = take()
	m, err := vmtest.DialMonitor(t.Context(), d.v.QMPPath())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Execute(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	m.Close()
	d.newer = take()
	if err := d.v.Crash(); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *morgue) volume(id string) string {
	return filepath.Join(d.st.Dir(), "vms", d.v.Config().Name, image.DisksDirName, image.VolumeName(id, 0))
}

// restore brings one back; its guest's memory and disk log must agree.
func (d *morgue) restore(t *testing.T, id string, o Options) (*Result, *vmtest.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	serial, from := d.v.SerialPath(), d.v.SerialSize()
	if o.Clone {
		serial, from = filepath.Join(t.TempDir(), "serial"), 0
		m, err := plan.ParseMapping(d.v.SerialPath() + "=" + serial)
		if err != nil {
			t.Fatal(err)
		}
		o.Map = []plan.Mapping{m}
	}
	res, err := Run(ctx, d.st, id, o)
	if res != nil {
		t.Cleanup(func() { killRestored(t, res) })
	}
	if err != nil {
		t.Fatalf("restore %s: %v", id, err)
	}
	w := vmtest.StartAdopted(t, res.QEMUPID, res.QMP, serial, from)
	w.WaitLogSweeps(t, 1)
	w.WaitLog(t, 30)
	w.Invariants()
	return res, w
}

func (d *morgue) refused(t *testing.T, id string, code problem.Code, word string, o Options) {
	t.Helper()
	res, err := Run(t.Context(), d.st, id, o)
	if res != nil {
		killRestored(t, res)
	}
	if !problem.Is(err, code) || !strings.Contains(err.Error(), word) {
		t.Errorf("want %s with %q: %v", code, word, err)
	}
	if left, _ := os.ReadDir(o.RunRoot); len(left) > 0 {
		t.Errorf("left in the run directory: %v", left)
	}
	if left, _ := os.ReadDir(o.DiskDir); o.DiskDir != "" && len(left) > 0 {
		t.Errorf("left in the disk directory: %v", left)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDisks is the life of a machine with a disk after its death.
func TestDisks(t *testing.T) {
	cfg := vmtest.Config{MemoryMiB: 192, WSMiB: 8, Append: "GD_LOG=100",
		Disks: []vmtest.Disk{{FS: "ext4", Format: "raw", Options: "cache=writeback,discard=unmap,throttling.iops-total=2000"}}}
	d := newMorgue(t, cfg, image.Disk{Name: "disk0", Device: "disk0", Format: "raw"}, "")
	original := read(t, d.disk)
	opts := func(t *testing.T) Options {
		o := testOptions(t)
		o.DiskDir = t.TempDir()
		return o
	}

	t.Run("another instant's disk", func(t *testing.T) {
		o := opts(t)
		a, b, aside := d.volume(d.older), d.volume(d.newer), d.volume(d.older)+".aside"
		swap := func() {
			for _, mv := range [][2]string{{a, aside}, {b, a}, {aside, b}} {
				if err := os.Rename(mv[0], mv[1]); err != nil {
					t.Fatal(err)
				}
			}
		}
		swap()
		d.refused(t, d.older, problem.Integrity, d.older, o)
		d.refused(t, d.newer, problem.Integrity, d.newer, o)
		swap()
		// The same length, and one byte that is not the same.
		whole := read(t, b)
		harmed := bytes.Clone(whole)
		harmed[len(harmed)/2] ^= 1
		if err := os.WriteFile(b, harmed, 0o600); err != nil {
			t.Fatal(err)
		}
		d.refused(t, d.newer, problem.Integrity, "checksum", o)
		if err := os.WriteFile(b, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(a, aside); err != nil {
			t.Fatal(err)
		}
		d.refused(t, d.older, problem.Integrity, "volume", o)
		if err := os.Rename(aside, a); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("both lives", func(t *testing.T) {
		o := opts(t)
		res, w := d.restore(t, d.older, o)
		logPhases(t, res)
		if len(res.Disks) != 1 || res.Disks[0].Backing != d.volume(d.older) || filepath.Dir(res.Disks[0].Path) != o.DiskDir {
			t.Errorf("disks: %+v", res.Disks)
		}
		argv := strings.Join(w.Argv(), " ")
		if !strings.Contains(argv, "throttling.iops-total=2000") || !strings.Contains(argv, "serial=DISK0") || strings.Contains(argv, d.disk) {
			t.Errorf("command line: %s", argv)
		}
		// Nobody takes the volume away from under it.
		if _, err := d.st.Remove(t.Context(), d.older, false); !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), itoa(res.QEMUPID)) {
			t.Errorf("rm while its disk is used: %v", err)
		}
		// What an earlier restore made is not overwritten; neither is it removed.
		c := o
		c.Clone = true
		if _, err := Run(t.Context(), d.st, d.older, c); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "--disk-dir") {
			t.Errorf("a clone in the same place: %v", err)
		}
		c.DiskDir = t.TempDir()
		clone, cw := d.restore(t, d.older, c)
		if clone.Disks[0].Path == res.Disks[0].Path || clone.Disks[0].Backing != res.Disks[0].Backing {
			t.Errorf("the clone's disks: %+v", clone.Disks)
		}
		w.WaitLog(t, 20)
		cw.Kill()
		w.Kill()
		// Nor afterwards: the disk may be all that the VM wrote since.
		if _, err := d.st.Remove(t.Context(), d.older, false); !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), o.DiskDir) && !strings.Contains(err.Error(), c.DiskDir) {
			t.Errorf("rm while there is a disk that needs it: %v", err)
		}
		if h, err := qcow2.ReadHeader(res.Disks[0].Path); err != nil || h.Backing == "" {
			t.Errorf("the disk is gone, or independent by itself: %+v %v", h, err)
		}
		// The disk it died with is as good as any after a power failure.
		c2 := vmtest.CheckLog(t, vmtest.Disk{Path: res.Disks[0].Path, FS: "ext4"})
		if r := w.Report(); c2.Bad != 0 || c2.Last < r.LogSynced {
			t.Errorf("after its second death: %+v, memory said %d", c2, r.LogSynced)
		}
		if !bytes.Equal(original, read(t, d.disk)) {
			t.Error("the original was written to")
		}
	})
	t.Run("independent", func(t *testing.T) {
		o := opts(t)
		o.FlattenDisks = true
		res, w := d.restore(t, d.newer, o)
		if res.FlatNS <= 0 || res.Disks[0].Backing != "" {
			t.Errorf("not flat: %+v", res)
		}
		if h, err := qcow2.ReadHeader(res.Disks[0].Path); err != nil || h.Backing != "" {
			t.Errorf("header %+v, %v", h, err)
		}
		if i, err := d.st.List(t.Context()); err != nil || slices.ContainsFunc(i, func(i store.Info) bool { return heldBy(i, res.Disks[0].Path) }) {
			t.Errorf("still leased: %+v, %v", i, err)
		}
		w.WaitLogSweeps(t, 1)
		w.Invariants()
		w.Kill()
	})
	t.Run("original", func(t *testing.T) {
		o := testOptions(t)
		o.Disks = DisksOriginal
		d.refused(t, d.older, problem.Refused, "written to after", o)
		// Nothing was written after the newer one.
		res, w := d.restore(t, d.newer, o)
		if len(res.Disks) != 0 || !strings.Contains(strings.Join(w.Argv(), " "), d.disk) {
			t.Errorf("disks %+v, command line %q", res.Disks, w.Argv())
		}
		w.Kill()
		d.refused(t, d.newer, problem.Refused, "written to after", o)
	})
}

// TestEncryptedDisks: volumes that hold an encrypted image as it lay there are opened
// through the original's driver, with its secret; without the secret nothing starts.
func TestEncryptedDisks(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte("a passphrase"), 0o600); err != nil {
		t.Fatal(err)
	}
	tool := func(name string, args ...string) {
		t.Helper()
		for again := 0; ; again++ {
			out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
			if strings.Contains(string(out), "Unable to get accurate CPU usage") && again < 20 {
				continue // where the kernel counts CPU time in ticks it cannot find its iterations at the first try
			}
			if err != nil || strings.Contains(string(out), "failed") {
				t.Fatalf("%s %q: %v: %s", name, args, err, out)
			}
			return
		}
	}
	inner, outer := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.luks")
	secret := "secret,id=key0,file=" + key
	tool("qemu-img", "create", "-q", "--object", secret, "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key0,encrypt.iter-time=10", inner, "8M")
	tool("qemu-img", "create", "-q", "--object", secret, "-f", "luks", "-o", "key-secret=key0,iter-time=10", outer, "8M")
	opened := map[string]string{inner: "driver=qcow2,encrypt.key-secret=key0,file.filename=" + inner, outer: "driver=luks,key-secret=key0,file.filename=" + outer}
	for _, o := range opened {
		tool("qemu-io", "--object", secret, "--image-opts", o, "-c", "write -P 0x42 0 1M")
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 2, Args: []string{"-object", secret,
		"-drive", "if=none,id=d0,format=qcow2,encrypt.key-secret=key0,file=" + inner, "-device", "virtio-blk-pci,drive=d0",
		"-blockdev", "driver=file,node-name=f1,filename=" + outer, "-blockdev", "driver=luks,node-name=n1,file=f1,key-secret=key0",
		"-device", "virtio-blk-pci,id=blk1,drive=n1"}})
	st := testStore(t)
	// Copied as they lie there: what the guest sees never is in the store.
	id := takeCheckpoint(t, v, st, func(m *image.Manifest) {
		copyDisks(t, st, image.Disk{Name: "d0", Device: "d0", Format: "raw", Path: inner}, image.Disk{Name: "blk1", Node: "n1", Format: "raw", Path: outer})(m)
		for i, c := range []image.DiskContent{image.ContentQCOW2, image.ContentLUKS} {
			m.Disks[i].Content, m.Disks[i].SizeBytes = c, 8<<20
		}
		m.Disks[0].Format, m.Disks[1].Format = "qcow2", "luks"
		i := slices.Index(m.Machine.Argv, secret)
		m.Machine.Argv[i] = "secret,id=key0,data=" + image.RedactedMark
	})
	v.Kill()
	for path, o := range opened {
		tool("qemu-io", "--object", secret, "--image-opts", o, "-c", "write -P 0x66 0 1M")
		if err := os.Rename(path, path+".aside"); err != nil {
			t.Fatal(err)
		}
	}
	o := testOptions(t)
	o.DiskDir = t.TempDir()
	if _, err := Run(t.Context(), st, id, o); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "--secret key0=FILE") {
		t.Errorf("without the secret: %v", err)
	}
	o.Secrets = map[string]string{"key0": key}
	res := restoreAndCheck(t, st, id, o, v)
	m, err := vmtest.DialMonitor(t.Context(), res.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, c := range []string{"d0 \"read -P 0x42 0 1M\"", "n1 \"read -P 0x42 0 1M\"",
		// The inner image grows while its guest fills the disk.
		"d0 \"write -P 0x43 1M 7M\"", "n1 \"write -P 0x43 1M 7M\"", "d0 \"read -P 0x43 1M 7M\"", "d0 \"read -P 0x42 0 1M\""} {
		if out, err := m.HMP(t.Context(), "qemu-io "+c); err != nil || strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("%s: %v: %s", c, err, out)
		}
	}
	for _, d := range res.Disks {
		if b := read(t, d.Path); bytes.Contains(b, bytes.Repeat([]byte{0x43}, 4096)) {
			t.Errorf("%s has what the guest wrote in the clear", d.Path)
		}
	}
}

// TestDisksForAnotherUser: a QEMU without root's rights gets copies, which it may open,
// and nothing that it needs stays in the store.
func TestDisksForAnotherUser(t *testing.T) {
	const nobody = 65534
	dir, err := os.MkdirTemp("", "ckd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk := filepath.Join(dir, "a.raw")
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 2,
		Disks: []vmtest.Disk{{Path: disk, Format: "raw", MiB: 8, Options: "discard=unmap"}}})
	st := testStore(t)
	id := takeCheckpoint(t, v, st, func(m *image.Manifest) {
		copyDisks(t, st, image.Disk{Name: "disk0", Device: "disk0", Format: "raw", Path: disk})(m)
		m.Disks[0].SizeBytes = 8 << 20
		m.Machine.UID, m.Machine.GID = nobody, nobody
	})
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	o := testOptions(t)
	o.DiskDir = filepath.Join(dir, "disks", "of-this-vm")
	if err := errors.Join(os.Chmod(dir, 0o711), os.Chmod(o.RunRoot, 0o711),
		os.Chown(v.Dir(), nobody, nobody), os.Chown(v.SerialPath(), nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	res := restoreAndCheck(t, st, id, o, v)
	var own unix.Stat_t
	if err := unix.Stat(res.Disks[0].Path, &own); err != nil || own.Uid != nobody || own.Mode&0o777 != 0o600 {
		t.Errorf("the disk belongs to %d, mode %o, %v", own.Uid, own.Mode, err)
	}
	if h, err := qcow2.ReadHeader(res.Disks[0].Path); err != nil || h.Backing != "" || res.Disks[0].Backing != "" || h.SizeBytes != 8<<20 {
		t.Errorf("header %+v, %v; result %+v", h, err, res.Disks)
	}
	if !strings.Contains(strings.Join(res.Notes, " "), "copied") {
		t.Errorf("notes: %q", res.Notes)
	}
	if all, err := st.List(t.Context()); err != nil || slices.ContainsFunc(all, func(i store.Info) bool { return i.Leased() }) {
		t.Errorf("leased: %+v, %v", all, err)
	}
}

// heldBy reports whether a disk needs the checkpoint: the disks of tests before count as
// about to be made for as long as this process lives.
func heldBy(i store.Info, disk string) bool {
	return slices.ContainsFunc(i.Leases, func(l store.Lease) bool { return l.Path == disk && l.State != store.Dead })
}
