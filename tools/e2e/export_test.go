package e2e

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/guest"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// exported is what export reports.
type exported struct {
	ID      string `json:"id"`
	Format  string `json:"format"`
	Bytes   int64  `json:"output_bytes"`
	VCPUs   int    `json:"vcpus"`
	Path    string
	Command []string
	Map     []struct {
		GPA    uint64 `json:"gpa"`
		Bytes  uint64 `json:"bytes"`
		Offset uint64 `json:"output_offset"`
		Block  string `json:"block"`
	}
}

// TestExport stops a guest, asks QEMU for its registers and its own dump, takes a
// checkpoint, and compares all exports with what QEMU said.
func TestExport(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots a guest")
	}
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Machine: "q35", VCPUs: 2, MemoryMiB: 192, WSMiB: 16, SweepMS: 500, Rate: 2000, Control: true,
		Args: []string{"-device", "pcie-root-port,id=port0,chassis=1"}}) // saved before what was made earlier
	v.WaitSweeps(t, 1)
	m := monitor(t, v.ControlPath())
	dir := t.TempDir()
	dump := filepath.Join(dir, "qemu.core")
	hmp := stopAndDump(t, m, dump)
	id := x.checkpoint(t, v.PID()).ID
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	export := func(t *testing.T, format, file string, args ...string) (e exported) {
		t.Helper()
		path := filepath.Join(dir, file)
		x.json(t, &e, append([]string{"export", id, "--store", x.store, "--format", format, "-o", path}, args...)...)
		st, err := os.Stat(path)
		if err != nil || st.Size() != e.Bytes || st.Mode() != 0o600 || e.Path != path || e.ID != id {
			t.Errorf("%+v, file %v, %v", e, st, err)
		}
		return e
	}

	t.Run("elf", func(t *testing.T) {
		e := export(t, "elf", "core")
		if e.VCPUs != 2 {
			t.Errorf("%d vCPUs", e.VCPUs)
		}
		compareCores(t, dump, filepath.Join(dir, "core"))
	})
	t.Run("gdb", func(t *testing.T) { readWithGDB(t, x, id, filepath.Join(dir, "core"), hmp) })
	t.Run("raw", func(t *testing.T) {
		e := export(t, "raw", "raw")
		compareRaw(t, dump, filepath.Join(dir, "raw"), e)
		// The same on a pipe.
		r := x.run(t, "export", id, "--store", x.store, "--format", "raw", "--json")
		file, err := os.ReadFile(filepath.Join(dir, "raw"))
		if err != nil || r.code != exitOK || r.out != string(file) {
			t.Errorf("%v: exit %d, %d bytes on standard output, %d in the file: %s", err, r.code, len(r.out), len(file), r.err)
		}
	})
	t.Run("qemu", func(t *testing.T) {
		e := export(t, "qemu", "stream")
		loadAndGoOn(t, v, e.Command, nil)
		q, err := guest.QEMU10(t.Context())
		if err != nil {
			vmtest.Skip(t, "qemu10", "QEMU 10 cannot be unpacked here: %v", err)
		}
		loadAndGoOn(t, v, slices.Concat([]string{q.Binary}, q.Args, e.Command[1:]), q.Env)
	})
	t.Run("damage", func(t *testing.T) {
		spoil(t, filepath.Join(x.dir(t, id), "seg-0000"))
		for _, format := range []string{"qemu", "elf", "raw"} {
			path := filepath.Join(dir, "damaged")
			x.fails(t, exitIntegrity, []string{"checksum"}, "export", id, "--store", x.store, "--format", format, "-o", path)
			if left, _ := filepath.Glob(filepath.Join(dir, "*damaged*")); len(left) > 0 {
				t.Errorf("%s: left behind: %q", format, left)
			}
			// On a pipe the data has standard output to itself.
			r := x.run(t, "export", id, "--store", x.store, "--format", format, "--json")
			if r.code != exitIntegrity || strings.Contains(r.out, "ckagent.error") || !strings.Contains(r.err, `"code":"integrity"`) {
				t.Errorf("%s: exit %d, standard error %s", format, r.code, r.err)
			}
		}
	})
}

// stopAndDump stops the machine, has QEMU write a core of its own and returns what
// it says of the registers of vCPU 0.
func stopAndDump(t *testing.T, m *vmtest.Monitor, path string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := m.Execute(ctx, "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	regs, err := m.HMP(ctx, "info registers")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Execute(ctx, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + path}, nil); err != nil {
		t.Fatal(err)
	}
	return regs
}

func openCore(t *testing.T, path string) *elf.File {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		t.Errorf("%s: %+v", path, f.FileHeader)
	}
	return f
}

// loadsOf are the PT_LOADs by physical address, neighbours joined.
func loadsOf(t *testing.T, f *elf.File) (out []*elf.Prog) {
	t.Helper()
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Filesz > 0 {
			out = append(out, p)
		}
	}
	if len(out) == 0 {
		t.Fatal("no memory in the core")
	}
	return out
}

func notesOf(t *testing.T, f *elf.File) []byte {
	t.Helper()
	for _, p := range f.Progs {
		if p.Type == elf.PT_NOTE {
			b, err := io.ReadAll(p.Open())
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
	}
	t.Fatal("no notes in the core")
	return nil
}

// compareCores holds ours against QEMU's, which has the same notes and the same
// memory at the same physical addresses.
func compareCores(t *testing.T, theirs, ours string) {
	t.Helper()
	a, b := openCore(t, theirs), openCore(t, ours)
	if want, got := notesOf(t, a), notesOf(t, b); !bytes.Equal(want, got) {
		at := 0
		for at < len(want) && at < len(got) && want[at] == got[at] {
			at++
		}
		t.Errorf("notes differ from byte %d on: QEMU's have %d bytes, ours %d", at, len(want), len(got))
	}
	var total uint64
	for _, p := range loadsOf(t, a) {
		total += p.Filesz
		want, err := io.ReadAll(p.Open())
		if err != nil {
			t.Fatal(err)
		}
		if got := physicalOf(t, b, p.Paddr, p.Filesz); !bytes.Equal(want, got) {
			t.Errorf("memory from %#x on (%#x bytes) differs", p.Paddr, p.Filesz)
		}
	}
	if total < 192<<20 {
		t.Errorf("QEMU's core has %d bytes of memory: the test tests nothing", total)
	}
}

// physicalOf reads physical memory out of a core.
func physicalOf(t *testing.T, f *elf.File, at, n uint64) []byte {
	t.Helper()
	out := make([]byte, 0, n)
	for n > 0 {
		k := uint64(0)
		for _, p := range loadsOf(t, f) {
			if at >= p.Paddr && at < p.Paddr+p.Filesz {
				k = min(n, p.Paddr+p.Filesz-at)
				b := make([]byte, k)
				if _, err := p.ReadAt(b, int64(at-p.Paddr)); err != nil {
					t.Fatal(err)
				}
				out = append(out, b...)
				break
			}
		}
		if k == 0 {
			t.Errorf("no memory at %#x", at)
			return out
		}
		at, n = at+k, n-k
	}
	return out
}

// compareRaw holds the flat file against QEMU's core, and the holes against zeros.
func compareRaw(t *testing.T, theirs, path string, e exported) {
	t.Helper()
	a := openCore(t, theirs)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var ram uint64
	for _, r := range e.Map {
		ram += r.Bytes
		got := make([]byte, r.Bytes)
		if _, err := f.ReadAt(got, int64(r.Offset)); err != nil {
			t.Fatal(err)
		}
		if r.GPA != r.Offset || !bytes.Equal(got, physicalOf(t, a, r.GPA, r.Bytes)) {
			t.Errorf("memory at %#x differs", r.GPA)
		}
	}
	if ram < 190<<20 || ram > 192<<20 {
		t.Errorf("the map has %d bytes of RAM: %+v", ram, e.Map)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used >= st.Size() {
		t.Errorf("%d bytes on disk of %d: the file is not sparse", used, st.Size())
	}
}

// banner is what a Linux kernel says first; it stands in its memory.
const banner = "Linux version "

// readWithGDB has gdb read a string out of the guest's memory, by physical and by
// virtual address, and the registers.
func readWithGDB(t *testing.T, x *tool, id, core, hmp string) {
	gdb, err := exec.LookPath("gdb")
	if err != nil {
		t.Fatalf("gdb: %v (tools/install/install.sh brings it)", err)
	}
	run := func(core string, commands ...string) string {
		t.Helper()
		args := []string{"-nx", "-batch", "-ex", "set pagination off", "-ex", "core-file " + core}
		for _, c := range commands {
			args = append(args, "-ex", c)
		}
		out, err := exec.Command(gdb, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("gdb: %v\n%s", err, out)
		}
		return string(out)
	}
	at := find(t, openCore(t, core), banner)
	if out := run(core, fmt.Sprintf("x/s %#x", at.Paddr)); !strings.Contains(out, banner) {
		t.Errorf("gdb does not read %q at %#x: %s", banner, at.Paddr, out)
	}
	out := run(core, "info registers", "info threads")
	for gdbName, qemuName := range map[string]string{"rip": "RIP", "rsp": "RSP", "rax": "RAX", "rbx": "RBX", "r15": "R15", "eflags": "RFL"} {
		want := regexp.MustCompile(`(?m)\b` + qemuName + `=([0-9a-f]+)`).FindStringSubmatch(hmp)
		got := regexp.MustCompile(`(?m)^` + gdbName + ` +0x([0-9a-f]+)`).FindStringSubmatch(out)
		if want == nil || got == nil {
			t.Fatalf("no %s in %s\nor %s", gdbName, hmp, out)
		}
		w, err1 := strconv.ParseUint(want[1], 16, 64)
		g, err2 := strconv.ParseUint(got[1], 16, 64)
		if err1 != nil || err2 != nil || w != g {
			t.Errorf("%s: gdb says %x, QEMU said %x", gdbName, g, w)
		}
	}
	if !strings.Contains(out, "2 ") {
		t.Errorf("gdb does not see two vCPUs: %s", out)
	}

	virtual := core + ".virtual"
	var e exported
	x.json(t, &e, "export", id, "--store", x.store, "--format", "elf", "--paging", "-o", virtual)
	f := openCore(t, virtual)
	for _, p := range loadsOf(t, f) {
		// The kernel's own mapping of itself, at the top.
		if at.Paddr >= p.Paddr && at.Paddr < p.Paddr+p.Filesz && p.Vaddr >= 0xffffffff80000000 {
			v := p.Vaddr + at.Paddr - p.Paddr
			if out := run(virtual, fmt.Sprintf("x/s %#x", v)); !strings.Contains(out, banner) {
				t.Errorf("gdb does not read %q at virtual %#x: %s", banner, v, out)
			}
			return
		}
	}
	t.Errorf("the kernel's text (physical %#x) is at no virtual address", at.Paddr)
}

// find finds a string in a core's memory, on a page of its own start.
func find(t *testing.T, f *elf.File, text string) elf.ProgHeader {
	t.Helper()
	for _, p := range loadsOf(t, f) {
		b, err := io.ReadAll(p.Open())
		if err != nil {
			t.Fatal(err)
		}
		// The first copies may be those of the boot loader; the kernel's own is
		// followed by how it was built.
		for from := 0; ; {
			i := bytes.Index(b[from:], []byte(text))
			if i < 0 {
				break
			}
			i += from
			if bytes.Contains(b[i:min(i+200, len(b))], []byte(" SMP")) && p.Paddr+uint64(i) >= 1<<20 {
				return elf.ProgHeader{Paddr: p.Paddr + uint64(i)}
			}
			from = i + 1
		}
	}
	t.Fatalf("%q is nowhere in the core", text)
	return elf.ProgHeader{}
}

// loadAndGoOn has a stock QEMU load a migration stream with the command line that
// was printed, and follows the guest until it has verified its memory.
func loadAndGoOn(t *testing.T, old *vmtest.VM, argv, env []string) {
	t.Helper()
	from := old.SerialSize()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = old.Dir(), append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("%q said: %s", argv, said.String())
		}
	})
	await(t, "the socket of the new QEMU", func() bool {
		m, err := vmtest.DialMonitor(t.Context(), old.QMPPath())
		if err != nil {
			return false
		}
		return m.Close() == nil
	})
	w := vmtest.StartAdopted(t, cmd.Process.Pid, old.QMPPath(), old.SerialPath(), from)
	m := monitor(t, old.ControlPath())
	await(t, "the stream is in", func() bool { return state(t, m) == "paused" || state(t, m) == "running" })
	if err := m.Execute(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	w.WaitSweeps(t, 1)
	w.Invariants()
	w.Kill()
}

// await fails the test if the condition has not come true within half a minute.
func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for deadline := time.After(30 * time.Second); !condition(); {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// spoil changes one byte in the middle of a file.
func spoil(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	at := st.Size() / 2
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}
