package inject

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// TestVerdict: each obstacle is named, with advice.
func TestVerdict(t *testing.T) {
	good := facts{pid: 7, yama: -1, capPtrace: true, capAdmin: true, dumpable: true, elf64: true}
	user := facts{pid: 7, yama: 0, sameUser: true, dumpable: true, elf64: true}
	for _, c := range []struct {
		name string
		f    facts
		set  func(f *facts)
		want string // "" is permitted
	}{
		{"root", good, func(f *facts) {}, ""},
		{"same user", user, func(f *facts) {}, ""},
		{"traced", good, func(f *facts) { f.tracer, f.tracerComm = 9, "gdb" }, "pid 9 (gdb)"},
		{"32 bit", good, func(f *facts) { f.elf64 = false }, "64-bit"},
		{"strict seccomp", good, func(f *facts) { f.seccomp = 1 }, "strict seccomp"},
		{"filter, root", good, func(f *facts) { f.seccomp = 2 }, ""},
		{"filter, user", user, func(f *facts) { f.seccomp = 2 }, "CAP_SYS_ADMIN"},
		{"yama 3", good, func(f *facts) { f.yama, f.memErr = 3, unix.EACCES }, "ptrace_scope = 3"},
		{"yama 2 as root", good, func(f *facts) { f.yama = 2 }, ""},
		{"yama 2", user, func(f *facts) { f.yama, f.memErr = 2, unix.EACCES }, "ptrace_scope = 2"},
		{"yama 1", user, func(f *facts) { f.yama, f.memErr = 1, unix.EACCES }, "ptrace_scope = 1"},
		{"yama 1, but a child of ours", user, func(f *facts) { f.yama = 1 }, ""},
		{"other user", user, func(f *facts) { f.sameUser, f.memErr = false, unix.EACCES }, "another user"},
		{"not dumpable", user, func(f *facts) { f.dumpable, f.memErr = false, unix.EACCES }, "not dumpable"},
		{"apparmor", good, func(f *facts) { f.apparmor, f.memErr = "libvirt-1 (enforce)", unix.EACCES }, "libvirt-1"},
		{"apparmor lets us", good, func(f *facts) { f.apparmor = "libvirt-1 (enforce)" }, ""},
		{"something else", good, func(f *facts) { f.memErr = unix.EPERM }, "security module"},
		{"kernel thread", good, func(f *facts) { f.kernelThread = true }, "kernel thread"},
		{"ended", good, func(f *facts) { f.memErr = unix.ESRCH }, "ended"},
	} {
		f := c.f
		c.set(&f)
		err := f.verdict()
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want a word about %q", c.name, err, c.want)
			continue
		}
		if f.memErr != nil && !errors.Is(err, f.memErr) && c.name != "yama 3" {
			t.Errorf("%s: errno is lost", c.name)
		}
		if code := problem.CodeOf(err); code != problem.Refused && c.name != "ended" {
			t.Errorf("%s: code %s", c.name, code)
		}
	}
}

// TestWound: what an interrupted thread is brought back to.
func TestWound(t *testing.T) {
	regs := func(orig, rax int64) registers {
		return registers{Orig_rax: uint64(orig), Rax: uint64(rax), Rip: 0x1000, R10: ^uint64(0)}
	}
	for _, c := range []struct {
		name     string
		r        registers
		rax, rip uint64
		again    bool
	}{
		{"user mode", regs(-1, -512), ^uint64(511), 0x1000, false},
		{"finished call", regs(unix.SYS_READ, 5), 5, 0x1000, false},
		{"failed call", regs(unix.SYS_READ, -4), ^uint64(3), 0x1000, false},
		{"ERESTARTSYS", regs(unix.SYS_READ, -512), unix.SYS_READ, 0xffe, false},
		{"ERESTARTNOINTR", regs(unix.SYS_READ, -513), unix.SYS_READ, 0xffe, false},
		{"ERESTARTNOHAND", regs(unix.SYS_PPOLL, -514), unix.SYS_PPOLL, 0xffe, false},
		{"ENOIOCTLCMD is no restart", regs(unix.SYS_IOCTL, -515), ^uint64(514), 0x1000, false},
		{"ERESTART_RESTARTBLOCK", regs(unix.SYS_NANOSLEEP, -516), unix.SYS_NANOSLEEP, 0xffe, false},
		{"endless epoll_wait", regs(unix.SYS_EPOLL_WAIT, -4), unix.SYS_EPOLL_WAIT, 0xffe, true},
	} {
		if rax, rip, again := wound(&c.r); rax != c.rax || rip != c.rip || again != c.again {
			t.Errorf("%s: rax %#x rip %#x again %v", c.name, rax, rip, again)
		}
		back := returning(c.r)
		if c.again != (back.Rip != c.r.Rip) {
			t.Errorf("%s: let go at %#x", c.name, back.Rip)
		}
	}
	timed := regs(unix.SYS_EPOLL_WAIT, -4)
	timed.R10 = 1000
	if _, _, again := wound(&timed); again {
		t.Error("an epoll_wait with a timeout is repeated")
	}
}

// TestFrame checks what the kernel checks of a signal frame.
func TestFrame(t *testing.T) {
	const xcr0 = 0x2e7
	xstate := make([]byte, 4096)
	for i := range xstate {
		xstate[i] = byte(i)
	}
	binary.LittleEndian.PutUint64(xstate[xsaveHeader:], 7)
	r := registers{Rsp: 0x7fff12345678, Rip: 0x401000, Orig_rax: ^uint64(0), Cs: userCS64, Ss: 0x2b, R15: 15}
	for _, g := range []gadgets{{call: 0x10, signalReturn: 0x20}, {call: 0x10, popRax: 0x30}} {
		l := layoutBelow(r.Rsp, len(xstate), g)
		b := buildFrame(l, g, &r, 0x1234, xstate, xcr0)
		le := binary.LittleEndian
		at := func(addr uint64) []byte { return b[addr-l.entry:] }
		if l.end != r.Rsp-128 || l.fpstate%64 != 0 || l.frame%16 != 0 || l.fpstate+uint64(len(xstate))+4 > l.end ||
			l.scratch+scratchBytes > l.fpstate || l.frame+frameBytes > l.scratch {
			t.Fatalf("layout %+v", l)
		}
		if g.signalReturn != 0 && (l.entry != l.frame || le.Uint64(b) != 0x20) {
			t.Errorf("returns to %#x", le.Uint64(b))
		}
		if g.signalReturn == 0 && (le.Uint64(b) != 0x30 || le.Uint64(b[8:]) != unix.SYS_RT_SIGRETURN || le.Uint64(at(l.frame)) != 0x10) {
			t.Errorf("chain % x", b[:24])
		}
		if le.Uint64(at(l.frame+frameSigmask)) != 0x1234 || le.Uint64(at(l.frame+frameFpstate)) != l.fpstate {
			t.Error("mask or fpstate pointer")
		}
		if le.Uint64(at(l.frame+frameGregs+7*8)) != 15 || le.Uint64(at(l.frame+frameGregs+16*8)) != r.Rip {
			t.Error("registers")
		}
		fx := at(l.fpstate)
		size := le.Uint32(fx[fxSwReserved+16:])
		if le.Uint32(fx[fxSwReserved:]) != fpMagic1 || le.Uint32(fx[fxSwReserved+4:]) != size+4 ||
			le.Uint32(fx[size:]) != fpMagic2 || le.Uint64(fx[fxSwReserved+8:])&7 != 7 {
			t.Errorf("software-reserved bytes % x", fx[fxSwReserved:fxSwReserved+24])
		}
		if !bytes.Equal(fx[:fxSwReserved], xstate[:fxSwReserved]) || !bytes.Equal(fx[576:size], xstate[576:size]) {
			t.Error("the XSAVE image changed")
		}
	}
}

func TestRank(t *testing.T) {
	in := func(nr int64, args ...uint64) thread {
		th := thread{tid: 2, state: 'S', nr: nr}
		copy(th.args[:], args)
		return th
	}
	vcpu := in(unix.SYS_FUTEX)
	vcpu.vcpu = true
	named := in(unix.SYS_FUTEX)
	named.comm = "CPU 0/TCG"
	running := thread{tid: 2, state: 'R', nr: -2}
	main := in(unix.SYS_PPOLL)
	main.tid = 1
	best := in(unix.SYS_FUTEX)
	order := []thread{best, in(unix.SYS_PPOLL), in(unix.SYS_FSYNC), main, in(unix.SYS_NANOSLEEP, 1, 2), vcpu, running}
	for i := 1; i < len(order); i++ {
		if order[i-1].rank(1) >= order[i].rank(1) {
			t.Errorf("%+v before %+v: %d, %d", order[i-1], order[i], order[i-1].rank(1), order[i].rank(1))
		}
	}
	if in(unix.SYS_IOCTL, 5, kvmRun).rank(1) != vcpu.rank(1) || named.rank(1) != vcpu.rank(1) {
		t.Error("a vCPU is not known by KVM_RUN or by name")
	}
	for _, state := range "DZXt" {
		if th := (thread{state: byte(state), nr: unix.SYS_FUTEX}); th.rank(1) != unfit {
			t.Errorf("state %c: %d", state, th.rank(1))
		}
	}
	for want, th := range map[bool][]thread{
		true: {in(unix.SYS_NANOSLEEP, 1, 2), in(unix.SYS_POLL, 0, 0, 10), in(unix.SYS_FUTEX, 0, 0, 0, 5),
			in(unix.SYS_CLOCK_NANOSLEEP, 1, 0, 5, 6), in(unix.SYS_EPOLL_WAIT, 0, 0, 0, 10)},
		false: {in(unix.SYS_NANOSLEEP, 1, 1), in(unix.SYS_POLL, 0, 0, 0xffffffff), in(unix.SYS_FUTEX),
			in(unix.SYS_FUTEX, 0, 0x89, 0, 5), in(unix.SYS_CLOCK_NANOSLEEP, 1, 1, 5, 6), in(unix.SYS_EPOLL_WAIT, 0, 0, 0, 0xffffffff)},
	} {
		for _, x := range th {
			if x.restartsInexactly() != want {
				t.Errorf("%d %v: restarts inexactly: %v", x.nr, x.args, !want)
			}
		}
	}
}

func TestGadgets(t *testing.T) {
	code := make([]byte, 3<<20)
	at := func(off int, b ...byte) { copy(code[off:], b) }
	at(1<<20-1, 0x0f, 0x05, 0xc3) // across the boundary of a chunk
	at(2<<20, 0x58, 0xc3)
	mem := bytes.NewReader(code)
	maps := []mapping{
		{start: 0, end: uint64(len(code)), perms: "r-xp"}, // anonymous: not used
	}
	if _, err := findGadgets(mem, maps); err == nil {
		t.Error("anonymous code was used")
	}
	maps[0].inode = 5
	g, err := findGadgets(mem, maps)
	if err != nil || g.call != 1<<20-1 || g.popRax != 2<<20 || g.signalReturn != 0 {
		t.Fatalf("%+v, %v", g, err)
	}
	if !verifyGadgets(mem, g) {
		t.Error("gadgets do not verify")
	}
	at(300, 0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05) // musl's
	if g, err = findGadgets(mem, maps); err != nil || g.signalReturn != 300 || !verifyGadgets(mem, g) {
		t.Fatalf("%+v, %v", g, err)
	}
	code[301]++
	if verifyGadgets(mem, g) {
		t.Error("changed code verifies")
	}
}

// TestFilter runs a filter as libseccomp makes them.
func TestFilter(t *testing.T) {
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 4},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: auditArchX8664},
		{Code: unix.BPF_RET | unix.BPF_K, K: seccompKillProcess},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 3, K: unix.SYS_SOCKET},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.AF_UNIX},
		{Code: unix.BPF_RET | unix.BPF_K, K: seccompErrno | 13},
		{Code: unix.BPF_RET | unix.BPF_K, K: seccompAllow},
	}
	allow := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: seccompAllow}}
	for _, c := range []struct {
		nr   uintptr
		arg  uintptr
		want uint32
	}{{unix.SYS_SOCKET, unix.AF_UNIX, seccompErrno | 13}, {unix.SYS_SOCKET, unix.AF_INET, seccompAllow}, {unix.SYS_CLOSE, 1, seccompAllow}} {
		got, err := seccompVerdict([][]unix.SockFilter{allow, prog}, seccompData(c.nr, 0, [6]uintptr{c.arg}))
		if err != nil || got != c.want {
			t.Errorf("%d(%d): %#x, %v; want %#x", c.nr, c.arg, got, err, c.want)
		}
	}
	kill := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: seccompKillProcess}}
	thread := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: seccompKillThread}}
	if v, _ := seccompVerdict([][]unix.SockFilter{thread, kill, allow}, seccompData(0, 0, [6]uintptr{})); v != seccompKillProcess {
		t.Errorf("strictest: %#x", v)
	}
}

func TestParseUnixSockets(t *testing.T) {
	const table = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 100 /run/x.sock
0000000000000000: 00000002 00000000 00000000 0002 01 101 @ckagent-inject-0011
0000000000000000: 00000002 00000000 00000000 0002 01 102
0000000000000000: 00000003 00000000 00000000 0001 03 103
0000000000000000: 00000003 00000000 00000000 0002 03 104
`
	got := parseUnixSockets(strings.NewReader(table))
	if len(got) != 2 || !got["socket:[101]"] || got["socket:[102]"] {
		t.Errorf("%v", got)
	}
	if _, ok := got["socket:[102]"]; !ok {
		t.Error("a fresh socket is not listed")
	}
}

func FuzzMapping(f *testing.F) {
	f.Add("7f5c00000000-7f5c00021000 r-xp 00000000 fe:00 1234 /usr/lib/x y.so (deleted)")
	f.Add("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]")
	f.Add("1-0 r 0 0 0")
	f.Fuzz(func(t *testing.T, line string) {
		m, err := parseMapping(line)
		if err == nil && m.end < m.start {
			t.Errorf("%q: %+v", line, m)
		}
		parseMaps(strings.NewReader(line))
	})
}

func FuzzThread(f *testing.F) {
	f.Add("12 (a) b) S 1 2", "202 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffd 0x7f")
	f.Add("12 (", "running")
	f.Add("12 (x) R", "-1 0x7ffd 0x7f")
	f.Fuzz(func(t *testing.T, stat, call string) {
		th, err := parseThreadStat(stat)
		if err != nil {
			return
		}
		parseThreadSyscall(call, &th)
		if r := th.rank(1); r < 0 || r > unfit {
			t.Errorf("rank %d", r)
		}
	})
}

// FuzzFilter: any program ends, without reading outside its data.
func FuzzFilter(f *testing.F) {
	f.Add([]byte{0x20, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0xff, 0x7f})
	f.Add([]byte{5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0x34, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		raw = raw[:min(len(raw), maxFilterInsns*bpfInsnBytes)]
		a, err1 := runFilter(decodeFilter(raw), seccompData(1, 2, [6]uintptr{3, 4, 5}))
		b, err2 := runFilter(decodeFilter(slices.Clone(raw)), seccompData(1, 2, [6]uintptr{3, 4, 5}))
		if a != b || (err1 == nil) != (err2 == nil) {
			t.Error("not a function of its input")
		}
	})
}
