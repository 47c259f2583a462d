package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// drive is one kind of drive: how its image is made and how QEMU is told.
type drive struct {
	name  string   // of the drive or node, for commands
	image []string // of qemu-img create; nothing is made if empty
	write []string // qemu-io's options that open the image, to fill it
	args  []string // of QEMU
	dead  string   // a file of the original that a restored VM must not need
}

// qemuTool runs one of QEMU's programs and fails the test unless it succeeds.
func qemuTool(t testing.TB, name string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// kindsOfDrives are drives that come with everything a real machine may have.
func kindsOfDrives(dir string) []drive {
	p := func(name string) string { return filepath.Join(dir, name) }
	return []drive{
		{name: "plain", image: []string{"-f", "raw", p("plain.raw"), "8M"}, write: []string{"-f", "raw", p("plain.raw")},
			args: []string{"-drive", "if=none,id=plain,format=raw,file=" + p("plain.raw") + ",cache=writeback,discard=unmap,throttling.iops-total=5000",
				"-device", "virtio-blk-pci,drive=plain,serial=PLAIN"}, dead: p("plain.raw")},
		// Two disks on one base.
		{name: "base", image: []string{"-f", "qcow2", p("base.qcow2"), "8M"}, write: []string{"-f", "qcow2", p("base.qcow2")}, dead: p("base.qcow2")},
		{name: "above1", image: []string{"-f", "qcow2", "-b", p("base.qcow2"), "-F", "qcow2", p("above1.qcow2")}, write: []string{"-f", "qcow2", p("above1.qcow2")},
			args: []string{"-drive", "if=none,id=above1,format=qcow2,file=" + p("above1.qcow2"), "-device", "virtio-blk-pci,drive=above1"}, dead: p("above1.qcow2")},
		{name: "above2", image: []string{"-f", "qcow2", "-b", p("base.qcow2"), "-F", "qcow2", p("above2.qcow2")}, write: []string{"-f", "qcow2", p("above2.qcow2")},
			args: []string{"-object", "throttle-group,id=group0,x-iops-total=5000",
				"-blockdev", "driver=file,node-name=basefile,filename=" + p("base.qcow2") + ",read-only=on",
				"-blockdev", "driver=qcow2,node-name=basenode,file=basefile,read-only=on",
				"-blockdev", "driver=file,node-name=above2file,filename=" + p("above2.qcow2"),
				"-blockdev", "driver=qcow2,node-name=above2node,file=above2file,backing=basenode",
				"-blockdev", "driver=throttle,node-name=above2,throttle-group=group0,file=above2node",
				"-device", "virtio-scsi-pci,id=scsi0", "-device", "scsi-hd,bus=scsi0.0,drive=above2,serial=ABOVE2"}, dead: p("above2.qcow2")},
		{name: "cd0", image: []string{"-f", "raw", p("cd.iso"), "2M"}, write: []string{"-f", "raw", p("cd.iso")},
			args: []string{"-drive", "if=none,id=cd0,media=cdrom,readonly=on,format=raw,file=" + p("cd.iso"), "-device", "ide-cd,drive=cd0"}},
	}
}

// TestKindsOfDrives: whatever a drive is made of, a restored machine reads in it what
// it held at the checkpoint, and the originals are neither needed nor touched.
func TestKindsOfDrives(t *testing.T) {
	x := newTool(t)
	dir := t.TempDir()
	drives := kindsOfDrives(dir)
	var args, names []string
	for i, d := range drives {
		qemuTool(t, "qemu-img", append([]string{"create", "-q"}, d.image...)...)
		qemuTool(t, "qemu-io", append(slices.Clone(d.write), "-c", fmt.Sprintf("write -P %d 0 1M", 0x10+i))...)
		args = append(args, d.args...)
		if d.args != nil {
			names = append(names, d.name)
		}
	}
	pattern := func(name string) int {
		return 0x10 + slices.IndexFunc(drives, func(d drive) bool { return d.name == name })
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, Rate: 2000, Idle: true, Control: true, Args: args})
	control := monitor(t, v.ControlPath())
	io := func(m *vmtest.Monitor, drive, command string) {
		t.Helper()
		out, err := m.HMP(t.Context(), fmt.Sprintf("qemu-io %s %q", drive, command))
		if err != nil || strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("%s: %s: %v: %s", drive, command, err, out)
		}
	}
	v.WaitProgress(t, 200)
	first := x.checkpoint(t, v.PID(), "--keep-last", "0", "--qmp", v.QMPPath())
	for _, name := range names {
		if name != "cd0" {
			io(control, name, "write -P 0xaa 0 64k")
		}
	}
	second := x.checkpoint(t, v.PID(), "--keep-last", "0", "--qmp", v.QMPPath())
	for _, name := range names {
		if name != "cd0" {
			io(control, name, "write -P 0xee 0 128k")
		}
	}
	wantUntouched(t, v.PID())
	var verified struct{ Verified bool }
	if x.json(t, &verified, "verify", second.ID, "--store", x.store); !verified.Verified {
		t.Error("not verified")
	}
	none := x.checkpoint(t, v.PID(), "--keep-last", "0", "--qmp", v.QMPPath(), "--disks", "none")
	control.Close()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	before := map[string]string{}
	for _, d := range drives {
		if d.dead != "" {
			before[d.dead] = fileSum(t, d.dead)
			if err := os.Rename(d.dead, d.dead+".aside"); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		id    string
		bytes int
		first int
	}{{first.ID, 64 << 10, 0}, {second.ID, 64 << 10, 0xaa}} {
		disks := t.TempDir()
		r, w := x.restore(t, c.id, v.SerialPath(), "--disk-dir", disks)
		m := monitor(t, r.QMP)
		for _, name := range names {
			want := c.first
			if want == 0 || name == "cd0" {
				want = pattern(name)
			}
			io(m, name, fmt.Sprintf("read -P %d 0 64k", want))
			io(m, name, fmt.Sprintf("read -P %d 64k 960k", pattern(name)))
			if name != "cd0" {
				io(m, name, "write -P 0x77 512k 64k")
			}
		}
		argv := strings.Join(w.Argv(), " ")
		for _, kept := range []string{"throttling.iops-total=5000", "serial=PLAIN", "serial=ABOVE2", "throttle-group=group0", "discard=unmap", filepath.Join(dir, "cd.iso")} {
			if !strings.Contains(argv, kept) {
				t.Errorf("the command line lost %s: %s", kept, argv)
			}
		}
		m.Close()
		w.WaitProgress(t, 200)
		w.Invariants()
		x.wantNoProcess(t)
		w.Kill()
		removeLater(r)
		if len(r.Disks) != len(names)-1 {
			t.Errorf("disks: %+v", r.Disks)
		}
	}
	t.Run("the CD is missing", func(t *testing.T) {
		cd := filepath.Join(dir, "cd.iso")
		moved := filepath.Join(t.TempDir(), "moved.iso")
		if err := os.Rename(cd, moved); err != nil {
			t.Fatal(err)
		}
		x.fails(t, exitRefused, []string{cd, "--map"}, "restore", second.ID, "--store", x.store, "--disk-dir", t.TempDir())
		r, w := x.restore(t, second.ID, v.SerialPath(), "--disk-dir", t.TempDir(), "--map", cd+"="+moved)
		io(monitor(t, r.QMP), "cd0", fmt.Sprintf("read -P %d 0 64k", pattern("cd0")))
		w.Kill()
		removeLater(r)
		if err := os.Rename(moved, cd); err != nil {
			t.Fatal(err)
		}
	})
	for path, sum := range before {
		if err := os.Rename(path+".aside", path); err != nil {
			t.Fatal(err)
		}
		if fileSum(t, path) != sum {
			t.Errorf("%s was written to", path)
		}
	}
	t.Run("taken without disks", func(t *testing.T) {
		f := x.fails(t, exitRefused, []string{"plain", "above2"}, "restore", none.ID, "--store", x.store)
		if !strings.Contains(f.Hint, "as-is") {
			t.Errorf("hint: %q", f.Hint)
		}
		x.fails(t, exitUsage, nil, "restore", none.ID, "--store", x.store, "--disks", "whatever")
		r, w := x.restore(t, none.ID, v.SerialPath(), "--disks", "as-is")
		m := monitor(t, r.QMP)
		io(m, "plain", "read -P 0xee 0 128k")
		if len(r.Disks) != 0 || !strings.Contains(strings.Join(r.Notes, "\n"), filepath.Join(dir, "plain.raw")) {
			t.Errorf("disks %+v, notes %q", r.Disks, r.Notes)
		}
		w.Kill()
		removeLater(r)
	})
}
