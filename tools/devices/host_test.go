package devices

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// host makes what a device needs outside of QEMU. Everything goes with the test.
type host struct {
	dir   string
	netns string // QEMU and ckagent run in it; "": ours
}

const diskBytes = 8 << 20

func (h *host) disk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(h.dir, "disk.raw")
	if err := os.WriteFile(path, make([]byte, diskBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (h *host) qcow2(t *testing.T) string {
	t.Helper()
	path := filepath.Join(h.dir, "disk.qcow2")
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.Itoa(diskBytes))
	return path
}

func (h *host) shm(t *testing.T) string {
	t.Helper()
	f, err := os.CreateTemp("/dev/shm", "ckagent-devices-")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	t.Cleanup(func() { os.Remove(f.Name()) })
	return f.Name()
}

// loop is a block device.
func (h *host) loop(t *testing.T) (dev, missing string) {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", h.disk(t)).Output()
	if err != nil {
		return "", "no loop devices"
	}
	dev = strings.TrimSpace(string(out))
	t.Cleanup(func() { command(t, "losetup", "--detach", dev) })
	return dev, ""
}

// nbd serves a disk on loopback and returns the port.
func (h *host) nbd(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	h.serve(t, "qemu-nbd", "--persistent", "--shared=8", "--bind=127.0.0.1", "--port="+port, "--format=raw", h.disk(t))
	await(t, "qemu-nbd listens", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return port
}

// vhostUser serves a disk by way of shared memory.
func (h *host) vhostUser(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(h.dir, "vhost-user.sock")
	h.serve(t, "qemu-storage-daemon", "--blockdev", "driver=file,node-name=d0,filename="+h.disk(t),
		"--export", "type=vhost-user-blk,id=e0,node-name=d0,writable=on,addr.type=unix,addr.path="+socket)
	await(t, "the storage daemon listens", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket
}

func (h *host) swtpm(t *testing.T) (socket, missing string) {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		return "", "no swtpm"
	}
	socket = filepath.Join(h.dir, "swtpm.sock")
	h.serve(t, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+h.dir, "--ctrl", "type=unixio,path="+socket)
	await(t, "swtpm listens", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket, ""
}

// namespace gives the machine a network of its own, with the tap ckd0.
func (h *host) namespace(t *testing.T, tap ...string) (missing string) {
	t.Helper()
	name := fmt.Sprintf("ckagent-devices-%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Sprintf("no network namespaces: %s", out)
	}
	t.Cleanup(func() { command(t, "ip", "netns", "del", name) })
	h.netns = name
	command(t, "ip", append([]string{"-n", name, "tuntap", "add", "ckd0", "mode", "tap"}, tap...)...)
	return ""
}

// hugetlbfs mounts one with pages of 2 MiB.
func (h *host) hugetlbfs(t *testing.T) (dir, missing string) {
	t.Helper()
	if missing = vmtest.HugePages(t, 2048, 40); missing != "" {
		return "", missing
	}
	dir = filepath.Join(h.dir, "hugetlbfs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("hugetlbfs", dir, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		return "", "hugetlbfs cannot be mounted: " + err.Error()
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // QEMU may not have gone yet
	return dir, ""
}

// serve runs a program until the test ends.
func (h *host) serve(t *testing.T, name string, args ...string) {
	t.Helper()
	c := exec.Command(name, args...)
	log, err := os.Create(filepath.Join(h.dir, filepath.Base(name)+".log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	c.Stdout, c.Stderr = log, log
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill() // it may have ended with its client
		_ = c.Wait()
	})
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Errorf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// await fails the test if the condition has not come true after some seconds.
func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		if condition() {
			return
		}
		<-tick.C
	}
	t.Fatalf("waited in vain: %s", what)
}
