package uffd_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
	"golang.org/x/sys/unix"
)

// The benchmarks measure fault service against the same target that
// tools/bench/cwp measures in C; median and 99th percentile are those the
// target sees. Run them with -benchtime 20000x.

const pageBytes = 4096

type benchTarget struct {
	h    *uffd.Handle
	pm   *pagemap.Pagemap
	pid  int
	base uint64
	in   *os.File
	out  *bufio.Scanner
	cmd  *exec.Cmd
}

func startTarget(b *testing.B, kind string, pages int) *benchTarget {
	b.Helper()
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		b.Skip("no gcc on this machine: the target cannot be built")
	}
	bin := filepath.Join(b.TempDir(), "cwp")
	if out, err := exec.Command(gcc, "-O2", "-o", bin, "../tools/bench/cwp/cwp.c").CombinedOutput(); err != nil {
		b.Fatalf("gcc: %v\n%s", err, out)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	t := &benchTarget{cmd: exec.Command(bin, "-T", "-k", kind, "-n", fmt.Sprint(pages))}
	stdinR, stdinW, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	defer stdinR.Close()
	t.in = stdinW
	t.cmd.Stdin, t.cmd.Stderr, t.cmd.ExtraFiles = stdinR, os.Stderr, []*os.File{theirs}
	t.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	stdout, err := t.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	t.out = bufio.NewScanner(stdout)
	if err := t.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		t.in.Close()
		_ = t.cmd.Process.Kill()
		_ = t.cmd.Wait()
	})
	t.pid = t.cmd.Process.Pid
	if !t.out.Scan() {
		b.Fatal("the target said nothing")
	}
	if _, err := fmt.Sscanf(t.out.Text(), "0x%x", &t.base); err != nil {
		b.Fatal(err)
	}
	var one [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], one[:], oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		b.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		b.Fatal(err)
	}
	if t.h, err = uffd.Adopt(os.NewFile(uintptr(fds[0]), "userfaultfd"), uffd.FeaturePagefaultFlagWP); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { t.h.Close() })
	if t.pm, err = pagemap.Open(t.pid); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { t.pm.Close() })
	mode := uffd.ModeWP
	if kind == "missing" {
		mode = uffd.ModeMissing
	}
	if _, err := t.h.Register(t.base, uint64(pages)*pageBytes, mode); err != nil {
		b.Fatal(err)
	}
	if mode == uffd.ModeWP {
		if err := t.h.WriteProtect(t.base, uint64(pages)*pageBytes); err != nil {
			b.Fatal(err)
		}
	}
	return t
}

func (t *benchTarget) start(b *testing.B) {
	if _, err := t.in.Write([]byte("g")); err != nil {
		b.Fatal(err)
	}
}

func (t *benchTarget) report(b *testing.B) {
	if !t.out.Scan() {
		b.Fatal("no result from the target")
	}
	for f := range strings.FieldsSeq(t.out.Text()) {
		var v float64
		if k, s, _ := strings.Cut(f, "="); k == "median_ns" || k == "p99_ns" {
			if _, err := fmt.Sscan(s, &v); err == nil {
				b.ReportMetric(v, strings.Replace(k, "_", "-", 1)+"/fault")
			}
		}
	}
}

// caller is the system call entry in use: bare or known to the scheduler.
type caller func(nr, a, b, c, d, e, f uintptr) (uintptr, uintptr, syscall.Errno)

func serve(b *testing.B, t *benchTarget, kind, way string, raw bool) {
	call := caller(syscall.Syscall6)
	if raw {
		call = syscall.RawSyscall6
	}
	if err := t.h.SetNonblock(way != "block"); err != nil {
		b.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	copyBuf := make([]byte, pageBytes)
	local := unix.Iovec{Base: &copyBuf[0], Len: pageBytes}
	remote := unix.RemoteIovec{Len: pageBytes}
	var msgs [8]uffd.Msg
	poll := []unix.PollFd{{Fd: int32(t.h.FD()), Events: unix.POLLIN}}
	b.ReportAllocs()
	b.ResetTimer()
	t.start(b)
	for done := 0; done < b.N; {
		var n int
		var spinUntil time.Time
		for {
			var errno unix.Errno
			if raw {
				n, errno = t.h.ReadRaw(msgs[:])
			} else {
				r, _, e := syscall.Syscall(unix.SYS_READ, uintptr(t.h.FD()), uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs))*uffd.MsgBytes)
				n, errno = int(r/uffd.MsgBytes), e
			}
			if errno == 0 {
				break
			}
			if errno == unix.EINTR {
				continue
			}
			if errno != unix.EAGAIN {
				b.Fatal(errno)
			}
			if way == "spin" {
				now := time.Now()
				if spinUntil.IsZero() {
					spinUntil = now.Add(50 * time.Microsecond)
				}
				if now.Before(spinUntil) {
					continue
				}
			}
			if _, _, e := call(unix.SYS_POLL, uintptr(unsafe.Pointer(&poll[0])), 1, ^uintptr(0), 0, 0, 0); e != 0 && e != unix.EINTR {
				b.Fatal(e)
			}
		}
		for _, m := range msgs[:n] {
			at := m.Address
			if kind == "missing" {
				if _, errno := t.h.CopyRaw(at, unsafe.Pointer(&copyBuf[0]), pageBytes, 0); errno != 0 {
					b.Fatal(errno)
				}
			} else {
				remote.Base = uintptr(at)
				if k, _, errno := call(unix.SYS_PROCESS_VM_READV, uintptr(t.pid), uintptr(unsafe.Pointer(&local)), 1,
					uintptr(unsafe.Pointer(&remote)), 1, 0); errno != 0 || k != pageBytes {
					b.Fatal(k, errno)
				}
				if raw {
					if armed, errno := t.pm.AllArmedRaw(at, at+pageBytes); !armed || errno != 0 {
						b.Fatal(armed, errno)
					}
					if errno := t.h.UnprotectRaw(at, pageBytes, true); errno != 0 {
						b.Fatal(errno)
					}
				} else {
					if armed, err := t.pm.AllArmed(at, at+pageBytes); !armed || err != nil {
						b.Fatal(armed, err)
					}
					if err := t.h.Unprotect(at, pageBytes, true); err != nil {
						b.Fatal(err)
					}
				}
			}
			done++
		}
	}
	b.StopTimer()
	t.report(b)
}

func BenchmarkFault(b *testing.B) {
	for _, kind := range []string{"write", "missing"} {
		for _, way := range []string{"poll", "block", "spin"} {
			for _, raw := range []bool{true, false} {
				if kind == "missing" && !raw {
					continue
				}
				entry := "raw"
				if !raw {
					entry = "syscall"
				}
				b.Run(kind+"/"+way+"/"+entry, func(b *testing.B) {
					serve(b, startTarget(b, kind, b.N), kind, way, raw)
				})
			}
		}
	}
}

func mapped(b *testing.B, length int) uint64 {
	b.Helper()
	m, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = unix.Munmap(m) })
	if err := unix.Madvise(m, unix.MADV_NOHUGEPAGE); err != nil {
		b.Fatal(err)
	}
	for i := 0; i < length; i += pageBytes {
		m[i] = 1
	}
	return uint64(uintptr(unsafe.Pointer(&m[0])))
}

func tracked(b *testing.B, start, length uint64, want uffd.Features) *uffd.Handle {
	b.Helper()
	f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		b.Fatal(err)
	}
	h, err := uffd.Adopt(f, want)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { h.Close() })
	if _, err := h.Register(start, length, uffd.ModeWP); err != nil {
		b.Fatal(err)
	}
	return h
}

// BenchmarkPage is the cost of single requests for one page.
func BenchmarkPage(b *testing.B) {
	const length = 1 << 20
	start := mapped(b, length)
	h := tracked(b, start, length, uffd.FeaturePagefaultFlagWP)
	pm, err := pagemap.OpenSelf()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { pm.Close() })
	b.Run("arm+unprotect", func(b *testing.B) {
		for b.Loop() {
			h.WriteProtectRaw(start, pageBytes)
			h.UnprotectRaw(start, pageBytes, true)
		}
	})
	b.Run("rearm", func(b *testing.B) {
		for b.Loop() {
			h.WriteProtectRaw(start, pageBytes)
		}
	})
	b.Run("check", func(b *testing.B) {
		for b.Loop() {
			if armed, errno := pm.AllArmedRaw(start, start+pageBytes); !armed || errno != 0 {
				b.Fatal(armed, errno)
			}
		}
	})
	b.Run("check256", func(b *testing.B) {
		if errno := h.WriteProtectRaw(start, length); errno != 0 {
			b.Fatal(errno)
		}
		for b.Loop() {
			if armed, errno := pm.AllArmedRaw(start, start+length); !armed || errno != 0 {
				b.Fatal(armed, errno)
			}
		}
	})
	b.Run("entry", func(b *testing.B) {
		var e [1]pagemap.Entry
		for b.Loop() {
			if _, err := pm.Entries(start, e[:]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkGiB is the cost of whole-memory requests, scaled to 1 GiB of 4 KiB
// pages (256 MiB are measured, so that it runs on small machines).
func BenchmarkGiB(b *testing.B) {
	const length, scale = 256 << 20, 4
	start := mapped(b, length)
	pm, err := pagemap.OpenSelf()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { pm.Close() })
	per := func(b *testing.B, what time.Duration) {
		b.ReportMetric(float64(what.Microseconds())/1000*scale/float64(b.N), "ms/GiB")
	}
	b.Run("arm", func(b *testing.B) {
		h := tracked(b, start, length, uffd.FeaturePagefaultFlagWP)
		var total time.Duration
		for range b.N {
			t := time.Now()
			if err := h.WriteProtect(start, length); err != nil {
				b.Fatal(err)
			}
			total += time.Since(t)
			if err := h.Unprotect(start, length, true); err != nil {
				b.Fatal(err)
			}
		}
		per(b, total)
		h.Close()
	})
	b.Run("unprotect", func(b *testing.B) {
		h := tracked(b, start, length, uffd.FeaturePagefaultFlagWP)
		var total time.Duration
		for range b.N {
			if err := h.WriteProtect(start, length); err != nil {
				b.Fatal(err)
			}
			t := time.Now()
			if err := h.Unprotect(start, length, true); err != nil {
				b.Fatal(err)
			}
			total += time.Since(t)
		}
		per(b, total)
		h.Close()
	})
	b.Run("check armed", func(b *testing.B) {
		h := tracked(b, start, length, uffd.FeaturePagefaultFlagWP)
		if err := h.WriteProtect(start, length); err != nil {
			b.Fatal(err)
		}
		b.ResetTimer()
		for range b.N {
			if armed, err := pm.AllArmed(start, start+length); !armed || err != nil {
				b.Fatal(armed, err)
			}
		}
		b.StopTimer()
		per(b, b.Elapsed())
		h.Close()
	})
	b.Run("entries", func(b *testing.B) {
		buf := make([]pagemap.Entry, 64<<10)
		for range b.N {
			for at := uint64(0); at < length; at += uint64(len(buf)) * pageBytes {
				if _, err := pm.Entries(start+at, buf); err != nil {
					b.Fatal(err)
				}
			}
		}
		per(b, b.Elapsed())
	})
	b.Run("async scan and rearm, idle", func(b *testing.B) {
		h := tracked(b, start, length, uffd.FeatureWPAsync|uffd.FeatureWPUnpopulated)
		if err := h.WriteProtect(start, length); err != nil {
			b.Fatal(err)
		}
		out := make([]pagemap.Region, 4096)
		q := pagemap.Query{Flags: pagemap.WPMatching, Mask: pagemap.IsWritten, Return: pagemap.IsWritten}
		b.ResetTimer()
		for range b.N {
			if err := pm.ScanAll(start, start+length, q, out, func(pagemap.Region) bool { return true }); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		per(b, b.Elapsed())
		h.Close()
	})
}
