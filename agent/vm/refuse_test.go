package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/cmdline"
	"golang.org/x/sys/unix"
)

func TestSharedMemoryOfOthersIsRefused(t *testing.T) {
	b := builds(t)[0]
	dir, err := os.MkdirTemp("/dev/shm", "ckvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "ram")
	args := []string{"-S", "-M", "pc,memory-backend=m", "-m", "64", "-object", "memory-backend-file,id=m,size=64M,share=on,mem-path=" + path}
	tgt := openQEMU(t, b, args...)
	if r, err := tgt.Refusals(t.Context()); err != nil || len(r) != 0 {
		t.Fatalf("alone: %+v %v", r, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	r, err := tgt.Refusals(t.Context())
	if err != nil || len(r) != 1 || r[0].Code != "shared-memory" || r[0].Object != "m" || !strings.Contains(r[0].Reason, "vm.test") {
		t.Errorf("mapped here too: %+v %v", r, err)
	}
}

func TestTracerIsRefused(t *testing.T) {
	tgt := openQEMU(t, builds(t)[0], "-S", "-M", "pc", "-m", "64")
	// ptrace belongs to the thread that calls it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := tgt.VCPUs[0].TID
	if err := unix.PtraceSeize(tid); err != nil {
		t.Fatal(err)
	}
	r, err := tgt.refuseTracer(t.Context())
	// A seized thread has to stop before it can be let go.
	if e := errors.Join(unix.PtraceInterrupt(tid), waitStop(tid), unix.PtraceDetach(tid)); e != nil {
		t.Fatal(e)
	}
	if err != nil || len(r) != 1 || r[0].Code != "traced" {
		t.Errorf("traced: %+v %v", r, err)
	}
	if r, err := tgt.refuseTracer(t.Context()); err != nil || len(r) != 0 {
		t.Errorf("let go: %+v %v", r, err)
	}
}

func waitStop(tid int) error {
	_, err := unix.Wait4(tid, nil, unix.WALL, nil)
	return err
}

func TestRegisteredUserfaultfdIsRefused(t *testing.T) {
	block := RAMBlock{Name: "pc.ram", HVA: 0x1000, TotalBytes: 0x2000, PageBytes: 4096, Backing: Anonymous}
	for _, c := range []struct {
		flags []string
		want  []string
	}{
		{[]string{"rd", "wr", "dc"}, nil},
		{[]string{"rd", "uw", "dc"}, []string{"userfaultfd"}},
		{[]string{"rd", "um", "dc"}, []string{"userfaultfd"}},
		{[]string{"rd", "ui", "dc"}, []string{"userfaultfd"}},
	} {
		vmas := []VMA{{Start: 0x1000, End: 0x2000, Perms: "rw-p", Flags: []string{"rd"}}, {Start: 0x2000, End: 0x3000, Perms: "rw-p", Flags: c.flags}}
		if got := codes(refuseBlock(&block, vmas)); !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.flags, got, c.want)
		}
	}
	if got := codes(refuseBlock(&block, nil)); !slices.Equal(got, []string{"layout"}) {
		t.Errorf("vanished: %q", got)
	}
	block.Backing, block.PageBytes = Hugetlb, 2<<20
	if got := codes(refuseBlock(&block, []VMA{{Start: 0x1000, End: 0x3000, Perms: "rw-p"}})); len(got) != 0 {
		t.Errorf("hugetlbfs: %q", got)
	}
	block.PageBytes = 1 << 30
	if got := codes(refuseBlock(&block, []VMA{{Start: 0x1000, End: 0x3000, Perms: "rw-p"}})); !slices.Equal(got, []string{"hugetlbfs"}) {
		t.Errorf("hugetlbfs: %q", got)
	}
}

func TestFlushDisks(t *testing.T) {
	dir := t.TempDir()
	disk := truncated(t, dir, "disk.img", 1<<20)
	none := openQEMU(t, builds(t)[0], "-S", "-M", "pc", "-m", "64", "-cdrom", truncated(t, dir, "cd.iso", 1<<20))
	if r, err := none.FlushDisks(t.Context()); err != nil || r.Nodes != 0 || r.Rounds != 0 || !r.Quick {
		t.Errorf("without writable disks: %+v %v", r, err)
	}
	for _, b := range builds(t) {
		tgt := openQEMU(t, b, "-S", "-M", "pc", "-m", "64", "-drive", "if=virtio,id=a,format=raw,file.locking=off,file="+disk)
		r, err := tgt.FlushDisks(t.Context())
		if err != nil || r.Nodes != 1 || r.Rounds == 0 {
			t.Errorf("%s: %+v %v", b.name, r, err)
		}
	}
}

func TestOpenSurvivesQEMUExitingAtAnyTime(t *testing.T) {
	b := builds(t)[0]
	for _, after := range []time.Duration{0, time.Millisecond, 3 * time.Millisecond, 8 * time.Millisecond, 20 * time.Millisecond} {
		cmd := startQEMU(t, b, "-S", "-M", "pc", "-m", "64")
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		tgt, err := Open(t.Context(), cmd.Process.Pid, Options{})
		if err == nil {
			_, err = tgt.Describe(t.Context())
			tgt.Close()
		}
		timer.Stop()
		if err != nil {
			t.Logf("killed after %v: %v", after, err)
		}
	}
}

func TestRedaction(t *testing.T) {
	for _, c := range []struct{ option, value, secret string }{
		{"object", "secret,id=s0,data=hunter2", "hunter2"},
		{"object", `{"qom-type":"secret","id":"s0","data":"hunter2"}`, "hunter2"},
		{"spice", "port=5900,password=hunter2", "hunter2"},
		{"drive", "file=https://joe:hunter2@example.org/a.iso,if=none", "hunter2"},
		{"drive", "file=iscsi://joe%hunter2@10.0.0.1/iqn/0", "hunter2"},
		{"iscsi", "user=joe,password=hunter2", "hunter2"},
		{"blockdev", `{"driver":"https","node-name":"n","cookie":"hunter2","url":"https://x/y"}`, "hunter2"},
		{"fw_cfg", "name=opt/io.systemd.credentials/root,string=hunter2", "hunter2"},
		{"cdrom", "ftp://joe:hunter2@example.org/a.iso", "hunter2"},
		{"drive", "file=rbd:pool/img:id=joe:key=hunter2,if=none", "hunter2"},
	} {
		r := &redactor{}
		args, err := cmdline.Parse([]string{"-" + c.option, c.value})
		if err != nil {
			t.Fatal(err)
		}
		got := r.options(args)[0].Value
		if strings.Contains(got, c.secret) || len(r.secrets) != 1 || !strings.Contains(got, r.secrets[0].Placeholder) {
			t.Errorf("-%s %s became %s, %+v", c.option, c.value, got, r.secrets)
		}
	}
	for _, c := range []struct{ option, value string }{
		{"vnc", ":1,password=on"}, {"object", "secret,id=s,file=/etc/key"}, {"drive", "file=/a,password-secret=s"},
		{"append", "root=/dev/vda quiet"}, {"chardev", "socket,id=a,host=10.0.0.1,port=5"}, {"device", "virtio-net-pci,mac=52:54:00:12:34:56"},
	} {
		r := &redactor{}
		args, err := cmdline.Parse([]string{"-" + c.option, c.value})
		if err != nil {
			t.Fatal(err)
		}
		if got := r.options(args)[0].Value; got != c.value || len(r.secrets) != 0 {
			t.Errorf("-%s %s became %s", c.option, c.value, got)
		}
	}
}

func TestCPUProps(t *testing.T) {
	got := cpuProps("host,+avx,-sse4.1,pmu=off,vmx=on,level=13,check")
	want := map[string]any{"avx": true, "sse4.1": false, "pmu": false, "vmx": true, "level": "13", "check": true}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: %v, want %v", k, got[k], v)
		}
	}
}

func TestSplitEnv(t *testing.T) {
	kept, loader := splitEnv([]string{"PATH=/bin", "LC_ALL=C", "SECRET=x", "LD_PRELOAD=/evil.so", "LD_LIBRARY_PATH=/lib", "AWS_SECRET_ACCESS_KEY=x"})
	if !slices.Equal(kept, []string{"LC_ALL=C", "PATH=/bin"}) || !slices.Equal(loader, []string{"LD_LIBRARY_PATH=/lib"}) {
		t.Errorf("kept %q, loader %q", kept, loader)
	}
}

func TestDescriptorsAreNamed(t *testing.T) {
	b := builds(t)[0]
	dir := t.TempDir()
	sock := filepath.Join(dir, "mon")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: sock}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	defer file.Close()
	cmd := exec.Command(b.binary, "-S", "-display", "none", "-M", "pc", "-m", "64", "-chardev", "socket,id=ch,fd=3,server=on,wait=off", "-mon", "chardev=ch,mode=control",
		"-add-fd", "fd=4,set=2", "-drive", "if=none,id=x,readonly=on,format=raw,file=/dev/fdset/2",
		"-add-fd", "fd=5,set=3", "-chardev", "file,id=log,path=/dev/fdset/3,append=on",
		"-add-fd", "fd=6,set=4", "-drive", "if=none,id=y,readonly=on,format=raw,file=/dev/fdset/4")
	img, err := os.Open(truncated(t, dir, "img", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	memfd, err := unix.MemfdCreate("nameless", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	nameless := os.NewFile(uintptr(memfd), "nameless")
	defer nameless.Close()
	if err := nameless.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	readOnly, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", memfd))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	cmd.ExtraFiles = []*os.File{file, img, write, readOnly}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var tgt *Target
	waitFor(t, func() bool { tgt, err = Open(t.Context(), cmd.Process.Pid, Options{}); return err == nil })
	defer tgt.Close()
	m, err := tgt.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(m.Changes, func(c Change) bool {
		return c.Kind == "replace" && len(c.New) == 2 && strings.Contains(c.New[1], "path="+sock) && !strings.Contains(c.New[1], "fd=")
	}) {
		t.Errorf("the listening socket is not named: %+v", m.Changes)
	}
	if !slices.Contains(m.Current, "if=none,id=x,readonly=on,format=raw,file="+img.Name()) || slices.Contains(m.Current, "-add-fd") {
		t.Errorf("the image is not named: %v", m.Current)
	}
	// A pipe is left to whoever restores; what has no name and is read is refused.
	if got := codes(m.Refusals); !slices.Equal(got, []string{"inherited-descriptor"}) {
		t.Errorf("refusals %+v", m.Refusals)
	}
}
