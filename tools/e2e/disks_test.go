package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// diskCombos are the file systems, buses and formats. The quick ones cover every
// pair of two; the rest is for long runs.
var diskCombos = []struct {
	quick bool
	disk  vmtest.Disk
}{
	{true, vmtest.Disk{FS: "ext4", Bus: "virtio-blk", Format: "qcow2"}},
	{true, vmtest.Disk{FS: "ext4", Bus: "virtio-scsi", Format: "raw"}},
	{true, vmtest.Disk{FS: "xfs", Bus: "virtio-blk", Format: "raw"}},
	{true, vmtest.Disk{FS: "xfs", Bus: "virtio-scsi", Format: "qcow2"}},
	{false, vmtest.Disk{FS: "ext4", Bus: "virtio-blk", Format: "raw"}},
	{false, vmtest.Disk{FS: "ext4", Bus: "virtio-scsi", Format: "qcow2"}},
	{false, vmtest.Disk{FS: "xfs", Bus: "virtio-blk", Format: "qcow2"}},
	{false, vmtest.Disk{FS: "xfs", Bus: "virtio-scsi", Format: "raw"}},
}

// logNumbers reads out of a checkpoint's memory what its guest knew of its disk log:
// the record whose write began last, and the last one that is safe.
func logNumbers(t testing.TB, dir string) (started, synced uint64) {
	t.Helper()
	r, err := image.OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	magic := []byte("ckagent: numbers of the disk log")
	found := 0
	buf := make([]byte, 4<<20)
	for i, b := range r.Manifest().Blocks {
		if !b.Main {
			continue
		}
		for at := uint64(0); at < b.UsedBytes; at += uint64(len(buf)) {
			part := buf[:min(uint64(len(buf)), b.UsedBytes-at)]
			if _, err := r.ReadRun(i, at/b.PageBytes, part); err != nil {
				t.Fatal(err)
			}
			for off := 0; off < len(part); off += pageBytes {
				// The program's own text has the words too, but no numbers behind them.
				page := part[off : off+pageBytes]
				if !bytes.HasPrefix(page, magic) {
					continue
				}
				found++
				started, synced = binary.LittleEndian.Uint64(page[32:]), binary.LittleEndian.Uint64(page[40:])
			}
		}
	}
	if found != 1 || synced > started || started == 0 {
		t.Fatalf("%d pages with numbers of a disk log, started %d, synced %d", found, started, synced)
	}
	return started, synced
}

// volume is the newest volume of a checkpoint's only disk.
func (x *tool) volume(t testing.TB, id string) string {
	t.Helper()
	return filepath.Join(filepath.Dir(x.dir(t, id)), image.DisksDirName, image.VolumeName(id, 0))
}

// diskFromOutside looks at a checkpoint's disk with nothing of ckagent: an overlay over
// the volume is given to a machine that replays the journal and reads the log, and then
// to the file system's own check.
func (x *tool) diskFromOutside(t testing.TB, id, fs string) vmtest.LogCheck {
	t.Helper()
	d := vmtest.Disk{FS: fs, Path: filepath.Join(t.TempDir(), "disk.qcow2"), Format: "qcow2"}
	out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2", "-b", x.volume(t, id), "-F", "qcow2", d.Path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := vmtest.CheckLog(t, d)
	if err := vmtest.CheckFS(t.Context(), d); err != nil {
		t.Errorf("%s: %v", id, err)
	}
	if err := os.Remove(d.Path); err != nil {
		t.Error(err)
	}
	return c
}

// TestDisks: checkpoints of a guest that writes and fsyncs all the time. The disk of
// each holds what the memory of the same checkpoint counts as safe and nothing it has
// not begun; the file system is clean; and the guest, restored, agrees.
func TestDisks(t *testing.T) {
	n, all := 1, os.Getenv("CKAGENT_E2E_ROUNDS") != ""
	if all {
		n = rounds(t)
	}
	only := os.Getenv("CKAGENT_E2E_DISKS") // such as ext4-virtio-blk-raw
	for _, c := range diskCombos {
		name := fmt.Sprintf("%s-%s-%s", c.disk.FS, c.disk.Bus, c.disk.Format)
		if !c.quick && !all || only != "" && only != name {
			continue // run on demand
		}
		t.Run(name, func(t *testing.T) { diskRounds(t, c.disk, n) })
	}
}

func diskRounds(t *testing.T, disk vmtest.Disk, n int, args ...string) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{MemoryMiB: 192, WSMiB: 8, Disks: []vmtest.Disk{disk}, Append: "GD_LOG=0"})
	var ids []string
	var longest time.Duration
	for range n {
		v.WaitLog(t, 40)
		c := x.checkpoint(t, v.PID(), append(args, "--keep-last", "0")...)
		wantUntouched(t, v.PID())
		ids = append(ids, c.ID)
		longest = max(longest, time.Duration(c.PauseNS))
	}
	v.WaitLog(t, 10)
	v.Invariants()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	original := v.Config().Disks[0].Path
	sum := fileSum(t, original)
	type pair struct{ started, synced, last uint64 }
	var pairs []pair
	for i, id := range ids {
		started, synced := logNumbers(t, x.dir(t, id))
		out := x.diskFromOutside(t, id, disk.FS)
		if out.Bad != 0 || out.Last < synced || out.Last > started || out.Records != out.Last-out.First+1 {
			t.Errorf("round %d: memory says %d safe and %d begun; the disk has %+v", i, synced, started, out)
		}
		pairs = append(pairs, pair{started, synced, out.Last})

		dir := t.TempDir()
		r, w := x.restore(t, id, v.SerialPath(), "--disk-dir", dir)
		w.WaitLogSweeps(t, 1)
		first := w.WaitLog(t, 20)
		x.wantDrained(t, r, w, false)
		w.Kill()
		removeLater(r)
		if len(r.Disks) != 1 || filepath.Dir(r.Disks[0].Path) != dir {
			t.Errorf("disks of the restore: %+v", r.Disks)
		}
		if first.LogSynced < synced+20 {
			t.Errorf("round %d: the log went on to %d from %d", i, first.LogSynced, synced)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
	if fileSum(t, original) != sum {
		t.Error("the original was written to")
	}
	// The test would have seen a disk of another instant.
	for i := 1; i < len(pairs); i++ {
		if a, b := pairs[i-1], pairs[i]; b.last <= a.started || a.last >= b.synced {
			t.Errorf("rounds %d and %d cannot be told apart: %+v, %+v", i-1, i, a, b)
		}
	}
	t.Logf("%d checkpoints, longest pause %v; last: memory %d safe, %d begun, disk %d", n, longest, pairs[n-1].synced, pairs[n-1].started, pairs[n-1].last)
	if n > 1 {
		x.wantMismatchRefused(t, ids[n-2], ids[n-1])
	}
}

// wantMismatchRefused gives a checkpoint the disk of another one.
func (x *tool) wantMismatchRefused(t *testing.T, a, b string) {
	t.Helper()
	va, vb := x.volume(t, a), x.volume(t, b)
	aside := filepath.Join(t.TempDir(), "aside")
	if err := errors.Join(copyFile(aside, va, 0o600), copyFile(va, vb, 0o600)); err != nil {
		t.Fatal(err)
	}
	x.fails(t, exitIntegrity, []string{filepath.Base(va)}, "restore", a, "--store", x.store)
	x.fails(t, exitIntegrity, []string{filepath.Base(va)}, "verify", a, "--store", x.store)
	if err := copyFile(va, aside, 0o600); err != nil {
		t.Fatal(err)
	}
	var verified struct{ Verified bool }
	if x.json(t, &verified, "verify", a, "--store", x.store); !verified.Verified {
		t.Error("put right, it does not verify")
	}
}

// fileSum is a checksum of a whole file, made by a program that is not ours.
func fileSum(t testing.TB, path string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sha256sum", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))[0]
}
