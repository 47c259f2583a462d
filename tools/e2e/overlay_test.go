package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestOverlayDisks is TestDisks with the guest's writes in overlays meanwhile.
func TestOverlayDisks(t *testing.T) {
	n, all := 1, os.Getenv("CKAGENT_E2E_ROUNDS") != ""
	if all {
		n = rounds(t)
	}
	for i, c := range diskCombos {
		if i != 1 && !all {
			continue // run on demand
		}
		t.Run(fmt.Sprintf("%s-%s-%s", c.disk.FS, c.disk.Bus, c.disk.Format), func(t *testing.T) {
			diskRounds(t, c.disk, n, "--disks", "overlay")
		})
	}
}

// strays lists the files of overlays beside the bed's image.
func (b diskBed) strays(t testing.TB) []string {
	t.Helper()
	found, err := filepath.Glob(b.image + ".ckagent-*")
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestAgentEndsWithAnOverlay: what the guest wrote since the switch is committed to its
// image, by the guardian, by detach or by the next checkpoint, and the overlay is gone.
func TestAgentEndsWithAnOverlay(t *testing.T) {
	all := func(t *testing.T, x *tool, s *started) {
		for _, signal := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // or one would act on another's death
			for _, pid := range x.processes() {
				_ = unix.Kill(pid, signal)
			}
		}
		s.wait(t, 10*time.Second)
	}
	for _, c := range []struct {
		name  string
		harm  func(t *testing.T, x *tool, s *started)
		clean func(t *testing.T, x *tool, b *diskBed)
	}{
		{"the guardian", func(t *testing.T, x *tool, s *started) {
			s.signal(unix.SIGKILL)
			s.wait(t, 10*time.Second)
		}, nil},
		{"detach", all, func(t *testing.T, x *tool, b *diskBed) {
			var d struct {
				Detached []struct{ Overlays []string }
			}
			x.json(t, &d, "detach", itoa(b.v.PID()))
			if len(d.Detached) != 1 || len(d.Detached[0].Overlays) != 1 || d.Detached[0].Overlays[0] != b.image {
				t.Errorf("detached %+v", d)
			}
			if r := x.run(t, "release", itoa(b.v.PID())); r.code != exitOK { // of all the rest
				t.Errorf("%s", r)
			}
		}},
		{"the next checkpoint", all, func(t *testing.T, x *tool, b *diskBed) {
			x.wantOnly(t, x.checkpoint(t, b.v.PID(), "--disks", "overlay").ID)
			// What the dead had lent for the device state goes with the last monitor's
			// connection, and ours is another one.
			b.m.Close()
			b.m = monitor(t, b.v.ControlPath())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			b := newDiskBed(t)
			s := x.start(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--disks", "overlay", "--disk-speed", "2M")
			b.awaitCopy(t)
			if out, err := b.m.HMP(t.Context(), `qemu-io disk0 "write -P 0x77 1M 8M"`); err != nil || strings.Contains(out, "failed") {
				t.Fatalf("%v %s", err, out)
			}
			if len(b.strays(t)) != 1 {
				t.Errorf("overlays: %q", b.strays(t))
			}
			c.harm(t, x, s)
			x.wantNoProcess(t)
			if c.clean != nil {
				c.clean(t, x, &b)
			}
			b.wantClean(t, true)
			if left := b.strays(t); len(left) > 0 {
				t.Errorf("overlays are left: %q", left)
			}
			qemuTool(t, "qemu-io", "-U", "-r", "-f", "qcow2", "-c", "read -P 0x77 1M 8M", b.image)
		})
	}
}

// TestEncryptedDisk: an image that QEMU decrypts is refused by a copy that would be plain,
// copied as it lies with --disks overlay, and restored by who has its secret.
func TestEncryptedDisk(t *testing.T) {
	x := newTool(t)
	dir := t.TempDir()
	secret, image := filepath.Join(dir, "secret"), filepath.Join(dir, "disk.qcow2")
	if err := os.WriteFile(secret, []byte("open sesame"), 0o600); err != nil {
		t.Fatal(err)
	}
	create := []string{"create", "-q", "-f", "qcow2", "--object", "secret,id=key0,file=" + secret,
		"-o", "encrypt.format=luks,encrypt.key-secret=key0,encrypt.iter-time=10", image, "16M"}
	for tries := 0; exec.Command("qemu-img", create...).Run() != nil; tries++ {
		if tries == 10 { // it measures how quick it is, and on a busy host fails to
			t.Fatal("qemu-img makes no encrypted image")
		}
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, Rate: 2000, Idle: true, Control: true,
		Args: []string{"-object", "secret,id=key0,data=open sesame", "-drive", "if=none,id=disk0,format=qcow2,encrypt.key-secret=key0,file=" + image,
			"-device", "virtio-blk-pci,drive=disk0"}})
	io := func(m *vmtest.Monitor, command string) {
		t.Helper()
		out, err := m.HMP(t.Context(), fmt.Sprintf("qemu-io disk0 %q", command))
		if err != nil || strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	m := monitor(t, v.ControlPath())
	io(m, "write -P 0x61 0 1M")
	if f := x.fails(t, exitRefused, []string{"encrypted"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--qmp", v.QMPPath()); !strings.Contains(f.Hint, "--disks overlay") {
		t.Errorf("hint: %q", f.Hint)
	}
	var ids []string
	for i := range 2 {
		c := x.checkpoint(t, v.PID(), "--qmp", v.QMPPath(), "--disks", "overlay")
		ids = append(ids, c.ID)
		io(m, fmt.Sprintf("write -P %d %dM 1M", 0x62+i, 1+i))
	}
	wantUntouched(t, v.PID())
	m.Close()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(image, image+".aside"); err != nil {
		t.Fatal(err)
	}
	for _, file := range storeFiles(t, x) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, clear := range []string{"open sesame", strings.Repeat("a", 512)} {
			if strings.HasSuffix(file, ".qcow2") && bytes.Contains(data, []byte(clear)) || strings.HasSuffix(file, "manifest.json") && bytes.Contains(data, []byte("sesame")) {
				t.Errorf("%s holds %.20q", file, clear)
			}
		}
	}
	if f := x.fails(t, exitRefused, []string{"key0"}, "restore", ids[1], "--store", x.store); !strings.Contains(f.Hint, "--secret key0=") {
		t.Errorf("hint: %q", f.Hint)
	}
	r, w := x.restore(t, ids[1], v.SerialPath(), "--disk-dir", t.TempDir(), "--secret", "key0="+secret)
	m = monitor(t, r.QMP)
	io(m, "read -P 0x61 0 1M")
	io(m, "read -P 0x62 1M 1M")
	io(m, "read -P 0 2M 1M")
	io(m, "write -P 0x62 2M 1M")
	m.Close()
	w.WaitProgress(t, 200)
	w.Invariants()
	w.Kill()
	removeLater(r)
	own, err := os.ReadFile(r.Disks[0].Path)
	if err != nil || bytes.Contains(own, []byte(strings.Repeat("b", 512))) {
		t.Errorf("what the restored guest wrote is there in the clear (%v)", err)
	}
}

// storeFiles lists all files of the store.
func storeFiles(t testing.TB, x *tool) (files []string) {
	t.Helper()
	err := filepath.Walk(x.store, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files in the store, %v", len(files), err)
	}
	return files
}
