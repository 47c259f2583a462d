package liveness

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// check looks for a subject and returns what it found as one text.
func check(t *testing.T, s Subject) string {
	t.Helper()
	doubts, err := Check(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, d := range doubts {
		all = append(all, d.String())
	}
	return strings.Join(all, "; ")
}

func TestCheck(t *testing.T) {
	flash := filepath.Join(t.TempDir(), "flash")
	if err := os.WriteFile(flash, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	const uuid = "0b9e33c0-7c11-4a53-8f7f-5a8d31f2a1e7"
	v := vmtest.Start(t, vmtest.Config{Name: "alive-and-well", MemoryMiB: 32, Guest: vmtest.NoGuest,
		Args: []string{"-uuid", uuid, "-blockdev", "driver=file,node-name=f,filename=" + flash,
			"-device", "virtio-blk-pci,drive=f"}})
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		s    Subject
		want string // empty: no doubt
	}{
		{"another", Subject{Name: "somebody-else", UUID: "ffffffff-7c11-4a53-8f7f-5a8d31f2a1e7", Sockets: []string{"/nowhere"}, Images: []string{"/nowhere"}}, ""},
		{"name", Subject{Name: "alive-and-well"}, "name alive-and-well"},
		{"uuid in capitals", Subject{UUID: strings.ToUpper(uuid)}, "UUID"},
		{"socket", Subject{Sockets: []string{v.QMPPath()}}, "listens on its socket"},
		{"image", Subject{Images: []string{flash}}, "has its image " + flash + " open"},
		{"image lock", Subject{Images: []string{flash}}, "holds the lock of the image"},
		{"recycled pid", Subject{PID: v.PID(), StartTicks: 1, BootID: boot}, ""},
		{"another boot", Subject{PID: v.PID(), BootID: "another"}, ""},
	} {
		if got := check(t, c.s); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	v.Kill()
	if got := check(t, Subject{Name: "alive-and-well", UUID: uuid, Sockets: []string{v.QMPPath()}, Images: []string{flash}, PID: v.PID(), BootID: boot}); got != "" {
		t.Errorf("after its death: %q", got)
	}
}

// TestStrangeCommandLine: what cannot be read as QEMU's options is no reason to look no
// further.
func TestStrangeCommandLine(t *testing.T) {
	sh, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Skip("no shell to be taken for QEMU")
	}
	dir := t.TempDir()
	bin, img := filepath.Join(dir, "qemu-system-x86_64"), filepath.Join(dir, "image")
	if err := os.WriteFile(bin, sh, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(bin, "-c", "echo up; read line", "---")
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if got := check(t, Subject{Name: "any", Images: []string{img}}); !strings.Contains(got, "has its image "+img+" open") {
		t.Errorf("%q", got)
	}
	in.Close()
	_ = cmd.Wait() // a shell that reads no line says so
}

func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "img")
	if held, err := Locked(path); err != nil || held {
		t.Errorf("a file that is not there: %v, %v", held, err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if held, err := Locked(path); err != nil || held {
		t.Errorf("nobody holds it: %v, %v", held, err)
	}
	// A shared lock on one permission byte, as QEMU takes it.
	l := unix.Flock_t{Type: unix.F_RDLCK, Start: 101, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	if held, err := Locked(path); err != nil || !held {
		t.Errorf("one holds it: %v, %v", held, err)
	}
}

func TestHold(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "locks")
	a, err := Hold(dir, "vm/1")
	if err != nil {
		t.Fatal(err)
	}
	var p *problem.Error
	if _, err := Hold(dir, "vm/1"); !errors.As(err, &p) || p.Code != problem.Refused || !strings.Contains(err.Error(), "pid ") {
		t.Errorf("twice: %v", err)
	}
	// Names that are alike, or alike for the most part of a file's name, are other VMs'.
	long := strings.Repeat("ü", 127)
	for _, names := range [][]string{{"vm2"}, {"vm_1"}, {long, long[:252], long + "1"}} {
		var held []*Guard
		for _, name := range names {
			b, err := Hold(dir, name)
			if err != nil {
				t.Fatalf("another VM, %q: %v", name, err)
			}
			held = append(held, b)
		}
		for _, b := range held {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := Hold(dir, "vm/1"); err != nil {
		t.Errorf("again: %v", err)
	} else if err := b.Close(); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestRecordedProcess: the process that was checkpointed is known by its pid and start
// time, also by somebody who may not look at what it runs.
func TestRecordedProcess(t *testing.T) {
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60") // a QEMU as little as one that may not be looked at
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	st, err := procstat.Read(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	s := Subject{PID: cmd.Process.Pid, StartTicks: st.StartTicks, BootID: boot}
	if got := check(t, s); !strings.Contains(got, "is the process that was checkpointed") {
		t.Errorf("while it lives: %q", got)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed
	if got := check(t, s); got != "" {
		t.Errorf("after its death: %q", got)
	}
}
