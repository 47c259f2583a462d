package qmp

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// TestDiscoverOtherNetworkNamespace: TCP and abstract names belong to QEMU's
// namespace, not to ours.
func TestDiscoverOtherNetworkNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	newNS := func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET} }
	t.Run("abstract", func(t *testing.T) {
		q := startQEMU(t, "/", "@ckagent-ns", newNS, "-qmp", "unix:ckagent-ns,abstract=on,server=on,wait=off")
		e := discoverOne(t, q)
		first := dial(t, e)
		defer first.Close()
		if _, err := Dial(testContext(t), e); !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), "qmp.test") {
			t.Errorf("second client: %v", err)
		}
	})
	t.Run("tcp", func(t *testing.T) {
		q := startQEMU(t, "/", "", newNS, "-qmp", "tcp:0.0.0.0:4444,server=on,wait=off")
		awaitTable(t, q.pid, listensTCP)
		if err := inNetNS(q.pid, loopbackUp); err != nil {
			t.Fatal(err)
		}
		if e := discoverOne(t, q); e.Address != "127.0.0.1:4444" {
			t.Errorf("found %+v", e)
		}
		if _, err := net.DialTimeout("tcp", "127.0.0.1:4444", time.Second); err == nil {
			t.Error("it listens in our namespace too: the test shows nothing")
		}
	})
}

// TestNamespaceIsLeftBehind enters another namespace often enough to meet
// every thread, and requires that none of ours stays there.
func TestNamespaceIsLeftBehind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			err := inNetNS(cmd.Process.Pid, func() error {
				if ns, _ := os.Readlink("/proc/thread-self/ns/net"); ns == own {
					return errors.New("still at home")
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ns, _ := os.Readlink("/proc/self/ns/net"); ns != own {
		t.Errorf("the process is in %s now, was in %s", ns, own)
	}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}
