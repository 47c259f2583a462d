package qmp

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
)

// discoverOne finds the only monitor of q and proves that it works.
func discoverOne(t *testing.T, q *qemuProcess) Endpoint {
	t.Helper()
	ctx := testContext(t)
	eps, err := Discover(ctx, q.pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(eps) != 1 {
		t.Fatalf("found %+v", eps)
	}
	talk(t, eps[0])
	return eps[0]
}

func talk(t *testing.T, e Endpoint) {
	t.Helper()
	c, err := Dial(testContext(t), e)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var st struct{ Status string }
	if err := c.Execute(testContext(t), "query-status", nil, &st); err != nil || st.Status == "" {
		t.Fatalf("%+v, %v", st, err)
	}
}

func TestDiscoverUnix(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "vm.conf")
	text := fmt.Sprintf("[chardev \"c\"]\n backend = \"socket\"\n path = \"%s/c.sock\"\n server = \"on\"\n wait = \"off\"\n"+
		"[mon]\n chardev = \"c\"\n mode = \"control\"\n", dir)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	comma := filepath.Join(dir, "a, b.sock")
	for name, c := range map[string]struct {
		wait, address string
		args          []string
	}{
		"qmp":           {"q.sock", dir + "/q.sock", []string{"-qmp", "unix:" + dir + "/q.sock,server=on,wait=off"}},
		"two dashes":    {"q2.sock", dir + "/q2.sock", []string{"--qmp", "unix:" + dir + "/q2.sock,server,nowait"}},
		"pretty":        {"p.sock", dir + "/p.sock", []string{"-qmp-pretty", "unix:" + dir + "/p.sock,server=on,wait=off"}},
		"comma, spaces": {comma, comma, []string{"-qmp", "unix:" + cmdline.Escape(comma) + ",server=on,wait=off"}},
		"relative":      {"rel.sock", dir + "/rel.sock", []string{"-qmp", "unix:rel.sock,server=on,wait=off"}},
		"mon": {"m.sock", dir + "/m.sock", []string{"-chardev", "socket,id=m,path=" + dir + "/m.sock,server=on,wait=off",
			"-mon", "m,mode=control"}},
		"qmp chardev": {"n.sock", dir + "/n.sock", []string{"-chardev", "socket,path=" + dir + "/n.sock,server=on,wait=off,id=n",
			"-qmp", "chardev:n"}},
		"set":        {"t.sock", dir + "/t.sock", []string{"-chardev", "socket,id=m,path=/nonexistent,server=on,wait=off", "-set", "chardev.m.path=" + dir + "/t.sock", "-mon", "chardev=m,mode=control,pretty=on"}},
		"readconfig": {"c.sock", dir + "/c.sock", []string{"-readconfig", "vm.conf"}},
		"abstract": {"@ckagent-test-" + strconv.Itoa(os.Getpid()), "@ckagent-test-" + strconv.Itoa(os.Getpid()),
			[]string{"-qmp", "unix:ckagent-test-" + strconv.Itoa(os.Getpid()) + ",abstract=on,server=on,wait=off"}},
	} {
		t.Run(name, func(t *testing.T) {
			q := startQEMU(t, dir, c.wait, nil, c.args...)
			e := discoverOne(t, q)
			if e.Network != "unix" || e.Address != c.address || e.PID != q.pid || e.Libvirt || e.inode == 0 {
				t.Errorf("found %+v", e)
			}
			// Without the way around by the listening socket.
			e.inode = 0
			talk(t, e)
			if name == "qmp" {
				p, err := ParseEndpoint(e.String())
				if err != nil {
					t.Fatal(err)
				}
				talk(t, p)
			}
		})
	}
}

func TestDiscoverPaddedAbstract(t *testing.T) {
	name := fmt.Sprintf("ckagent-padded-%d", os.Getpid())
	q := startQEMU(t, "/", "", nil, "-qmp", "unix:"+name+",abstract=on,tight=off,server=on,wait=off")
	awaitTable(t, q.pid, func(v *view) bool {
		for _, s := range v.unix {
			if _, ours := v.held[s.inode]; ours && s.listening {
				return true
			}
		}
		return false
	})
	discoverOne(t, q)
}

// awaitTable waits until the sockets of a process are as wanted.
func awaitTable(t *testing.T, pid int, ready func(*view) bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(15 * time.Second)
	for {
		v := view{pid: pid}
		v.held, _ = sockets(pid)
		v.read()
		if ready(&v) {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("QEMU does not listen")
		}
	}
}

func listensTCP(v *view) bool {
	for _, s := range v.listTCP() {
		if _, ours := v.held[s.inode]; ours && s.state == tcpListen {
			return true
		}
	}
	return false
}

func TestDiscoverTCP(t *testing.T) {
	// A port somebody else has, so that QEMU takes the next one.
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	for name, arg := range map[string]string{
		"any port": "tcp:127.0.0.1:0,server=on,wait=off",
		"range":    fmt.Sprintf("tcp:127.0.0.1:%d,to=%d,server=on,wait=off", port, min(port+50, 65535)),
		"any host": "tcp::0,server,nowait",
	} {
		t.Run(name, func(t *testing.T) {
			q := startQEMU(t, "/", "", nil, "-qmp", arg)
			awaitTable(t, q.pid, listensTCP)
			e := discoverOne(t, q)
			if e.Network != "tcp" {
				t.Fatalf("found %+v", e)
			}
			p, err := ParseEndpoint(e.String())
			if err != nil {
				t.Fatal(err)
			}
			first := dial(t, p)
			_, err = Dial(testContext(t), e)
			if !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), "qmp.test") {
				t.Errorf("second client: %v", err)
			}
			_ = first.Close()
			// The listener of a third party in QEMU's place.
			e.Address = taken.Addr().String()
			go func() {
				if c, err := taken.Accept(); err == nil {
					_, _ = c.Write([]byte(greeting))
					_, _ = c.Read(make([]byte, 1))
					_ = c.Close()
				}
			}()
			if _, err := Dial(testContext(t), e); !errors.Is(err, errStranger) || !problem.Is(err, problem.Refused) {
				t.Errorf("stranger: %v", err)
			}
		})
	}
}

// inherit returns a listening socket as a file QEMU gets as descriptor 3.
func inherit(t *testing.T, path string) func(*exec.Cmd) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	_ = l.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{f} }
}

func TestDiscoverInheritedSocketAsLibvirtDoes(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "libvirt", "qemu", "domain-1-vm", "monitor.sock")
	if err := os.MkdirAll(filepath.Dir(sock), 0o700); err != nil {
		t.Fatal(err)
	}
	q := startQEMU(t, "/", sock, inherit(t, sock),
		"-chardev", "socket,id=charmonitor,fd=3,server=on,wait=off", "-mon", "chardev=charmonitor,id=monitor,mode=control")
	eps, err := Discover(ctx, q.pid)
	if err != nil || len(eps) != 1 {
		t.Fatalf("found %v, %v", eps, err)
	}
	e := eps[0]
	if e.FD != 3 || !e.Libvirt || e.Address != sock {
		t.Errorf("found %+v", e)
	}
	// No daemon is there: nothing is done but what lets a machine go on.
	_, err = DialPID(ctx, q.pid)
	if p, ok := errors.AsType[*problem.Error](err); !ok || p.Code != problem.Refused || p.Hint != startDaemon {
		t.Errorf("libvirt's monitor without libvirt: %v", err)
	}
	c, err := DialOrphan(ctx, e)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Execute(ctx, "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	// Whoever is connected now is no daemon either.
	if _, err := OpenManaged(ctx, q.pid); !problem.Is(err, problem.Refused) {
		t.Errorf("libvirt's monitor in use by a stranger: %v", err)
	}
}

func TestDiscoverLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120), strings.Repeat("e", 120))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	name := strings.Repeat("s", 100)
	q := startQEMU(t, dir, name, nil, qmpAt(name)...)
	e := discoverOne(t, q)
	if len(e.Address) < 340 {
		t.Errorf("found %+v", e)
	}
	e.inode = 0
	talk(t, e)
	e.PID = 0
	talk(t, e)
}

// TestDiscoverWhereThePathLeadsNowhere: the listening socket leads to itself
// when its path does not any more.
func TestDiscoverWhereThePathLeadsNowhere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_NET_ADMIN)")
	}
	dir := t.TempDir()
	t.Run("unlinked", func(t *testing.T) {
		sock := filepath.Join(dir, "gone.sock")
		q := startQEMU(t, "/", sock, nil, qmpAt(sock)...)
		if err := os.Remove(sock); err != nil {
			t.Fatal(err)
		}
		discoverOne(t, q)
	})
	t.Run("chroot", func(t *testing.T) {
		sock := filepath.Join(dir, "outside.sock")
		q := startQEMU(t, "/", sock, nil, append(qmpAt(sock), "-chroot", t.TempDir())...)
		e := discoverOne(t, q)
		e.inode = 0
		talk(t, e)
	})
	t.Run("daemonized", func(t *testing.T) {
		pidfile := filepath.Join(dir, "pid")
		bin, err := exec.LookPath("qemu-system-x86_64")
		if err != nil {
			t.Skip("qemu-system-x86_64 is not installed")
		}
		cmd := exec.Command(bin, "-machine", "none", "-display", "none", "-S", "-daemonize", "-pidfile", pidfile,
			"-qmp", "unix:daemon.sock,server=on,wait=off")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		text, err := os.ReadFile(pidfile)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
		discoverOne(t, &qemuProcess{pid: pid})
	})
}

// TestDiscoverPathTakenOver: another QEMU has bound the same path since.
func TestDiscoverPathTakenOver(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "q.sock")
	first := startQEMU(t, "/", sock, nil, append(qmpAt(sock), "-name", "first")...)
	second := startQEMU(t, "/", sock, nil, append(qmpAt(sock), "-name", "second")...)
	_, err := Dial(testContext(t), Endpoint{Network: "unix", Address: sock, PID: first.pid, FD: -1})
	if !problem.Is(err, problem.Refused) || !errors.Is(err, errStranger) ||
		!strings.Contains(err.Error(), fmt.Sprintf("pid %d (qemu", second.pid)) {
		t.Errorf("the other QEMU: %v", err)
	}
	for _, q := range []*qemuProcess{first, second} {
		if os.Geteuid() != 0 && q == first {
			continue // only the listening socket leads there
		}
		c, err := DialPID(testContext(t), q.pid)
		if err != nil {
			t.Fatal(err)
		}
		var name struct{ Name string }
		if err := c.Execute(testContext(t), "query-name", nil, &name); err != nil ||
			name.Name != map[*qemuProcess]string{first: "first", second: "second"}[q] {
			t.Errorf("reached %q, %v", name.Name, err)
		}
		_ = c.Close()
	}
}

func TestDiscoverRefusals(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"human": {[]string{"-monitor", "unix:" + dir + "/h.sock,server=on,wait=off"}, "human monitor"},
		"stdio": {[]string{"-qmp", "stdio"}, "standard input"},
		"none":  {nil, "-qmp unix:PATH"},
	} {
		t.Run(name, func(t *testing.T) {
			q := startQEMU(t, dir, "", func(cmd *exec.Cmd) {
				if _, err := cmd.StdinPipe(); err != nil { // -qmp stdio ends QEMU at the end of its input
					t.Fatal(err)
				}
			}, c.args...)
			_, err := Discover(testContext(t), q.pid)
			if !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := Discover(testContext(t), 1<<30); !problem.Is(err, problem.NotFound) {
		t.Errorf("no such process: %v", err)
	}
	for _, e := range []Endpoint{
		{Network: "unix", Address: dir + "/absent"}, {Network: "unix", Address: dir}, {Network: "tcp", Address: "127.0.0.1:1"},
	} {
		if _, err := Dial(testContext(t), e); !problem.Is(err, problem.NotFound) {
			t.Errorf("%v: %v", e, err)
		}
	}
}

func FuzzTables(f *testing.F) {
	f.Add([]byte("Num RefCount Protocol Flags Type St Inode Path\n000: 00000002 00000000 00010000 0001 01 48271 /tmp/a b\n"),
		[]byte("  sl  local_address\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 123 1"))
	f.Fuzz(func(t *testing.T, u, tcp []byte) {
		for _, s := range parseUnixTable(u) {
			if s.listening && s.connected && s.inode == 0 && s.path == "" {
				return
			}
		}
		parseTCPTable(tcp)
		_, _ = parseUnixPeer(u)
	})
}
