package disksnap

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/store/storetest"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/tools/vmtest"
)

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return string(out)
}

func open(t *testing.T, args ...string) *vm.Target {
	t.Helper()
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.NoGuest, MemoryMiB: 64, Args: args})
	target, err := vm.Open(t.Context(), v.PID(), vm.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { target.Close() })
	return target
}

func sources(t *testing.T, target *vm.Target) []vm.DiskSource {
	t.Helper()
	list, refused, err := target.DiskSources(t.Context())
	if err != nil || len(refused) > 0 {
		t.Fatalf("refused %+v %v", refused, err)
	}
	return list
}

// TestSnapshots: the instant of two disks is kept inside their images, goes with its
// checkpoint at the next one into the same store, and a checkpoint that fails leaves
// nothing.
func TestSnapshots(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	images := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	for _, path := range images {
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
		run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 0 4M", path)
		run(t, "qemu-img", "snapshot", "-c", "ckagent-mine", path) // somebody's, whatever it is called
	}
	target := open(t, "-drive", "if=none,id=d0,format=qcow2,file="+images[0], "-device", "virtio-blk-pci,drive=d0,id=v",
		"-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.filename="+images[1], "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=n,id=s")
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	names := func() []string {
		var out []string
		for _, s := range sources(t, target) {
			out = append(out, s.Snapshots...)
		}
		return out
	}
	take := func(st *store.Store, commit bool) (id, snapshot string) {
		t.Helper()
		txn, err := st.Begin(ctx, "vm")
		if err != nil {
			t.Fatal(err)
		}
		s, err := Plan(Config{QMP: target.QMP, Sources: sources(t, target), Store: st, ID: txn.ID(), VM: "vm"})
		if err == nil {
			err = s.Prepare(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := target.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		calls, err := target.QMP.Send(s.Requests()...)
		if err == nil {
			err = s.Confirm(ctx, calls)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if !commit {
			if err := s.Drop(ctx); err != nil {
				t.Error(err)
			}
			txn.Abort()
			return "", ""
		}
		m, err := storetest.Fill(ctx, txn, 1, image.WriterOptions{})
		if err == nil {
			m.Disks, err = s.Seal(ctx)
		}
		if err == nil {
			err = txn.Commit(ctx, m)
		}
		if err != nil {
			t.Fatal(err)
		}
		return txn.ID(), m.Disks[0].Snapshot
	}
	first, name := take(st, true)
	if out, err := target.QMP.HMP(ctx, `qemu-io -d /machine/peripheral/v/virtio-backend "write -P 6 0 4M"`); err != nil || out != "" && !strings.Contains(out, "wrote") {
		t.Fatal(out, err)
	}
	copied := filepath.Join(dir, "copy")
	run(t, "qemu-img", "convert", "-U", "-f", "qcow2", "-l", "snapshot.name="+name, "-O", "raw", images[0], copied)
	if out := run(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 5 0 4M", copied); strings.Contains(out, "failed") {
		t.Errorf("the snapshot holds what was written later: %s", out)
	}
	before := names()
	if take(st, false); !slices.Equal(names(), before) {
		t.Errorf("a failed checkpoint left %q, before %q", names(), before)
	}
	_, second := take(st, true)
	other, err := store.Open(filepath.Join(dir, "other"))
	if err != nil {
		t.Fatal(err)
	}
	// What another store needs is not this one's to delete.
	_, elsewhere := take(other, true)
	if _, err := st.Remove(ctx, first, false); err != nil {
		t.Fatal(err)
	}
	_, third := take(st, true)
	want := []string{"ckagent-mine", second, elsewhere, third}
	if got := names(); !slices.Equal(got, append(want, want...)) {
		t.Errorf("snapshots %q, want %q twice", got, want)
	}
}

func TestSnapshotOfRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	run(t, "qemu-img", "create", "-q", "-f", "raw", path, "8M")
	target := open(t, "-drive", "if=virtio,format=raw,file="+path)
	if _, err := Plan(Config{QMP: target.QMP, Sources: sources(t, target)}); !problem.Is(err, problem.Refused) {
		t.Errorf("a snapshot inside a raw image: %v", err)
	}
}
