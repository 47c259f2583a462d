package signals

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// tap is a tap device of our own with a guest's echo server behind it.
type tap struct {
	name, host, guestIP string
	args                []string // QEMU's
	guest               string   // the guest's
}

var taps atomic.Int32

func newTap(t testing.TB) *tap {
	t.Helper()
	n := int(taps.Add(1))
	// Four addresses of the range for measurements (RFC 2544), which differ from those
	// of other tests that run on this host at the same time.
	base := 4 * ((os.Getpid()*8 + n) & 0x7fff)
	addr := func(i int) string {
		return fmt.Sprintf("198.%d.%d.%d", 18+(base+i)>>16, (base+i)>>8&255, (base+i)&255)
	}
	x := &tap{name: fmt.Sprintf("ck%x%d", os.Getpid()&0xffff, n), host: addr(1), guestIP: addr(2)}
	x.args = []string{"-netdev", "tap,id=tap0,ifname=" + x.name + ",script=no,downscript=no,vhost=off", "-device", "virtio-net-pci,netdev=tap0,romfile="}
	x.guest = "GD_ECHO=7 GD_IP=" + x.guestIP + "/30 GD_GW=" + x.host
	ip := func(args string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	ip("tuntap add dev " + x.name + " mode tap")
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "link", "del", "dev", x.name).CombinedOutput(); err != nil {
			t.Errorf("ip link del: %v: %s", err, out)
		}
	})
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+x.name+"/disable_ipv6", []byte("1"), 0); err != nil {
		t.Log("IPv6 stays on: ", err)
	}
	ip("addr add " + x.host + "/30 dev " + x.name)
	ip("link set " + x.name + " up")
	return x
}

func (x *tap) dial(t testing.TB) net.Conn {
	t.Helper()
	var c net.Conn
	eventually(t, "the guest answers", func() (ok bool) {
		var err error
		c, err = net.DialTimeout("tcp", x.guestIP+":7", time.Second)
		return err == nil
	})
	return c
}

// requests asks the guest so many times a second until stop is called, which returns
// how many answers there were.
func (x *tap) requests(t testing.TB, perSecond int) (stop func() int) {
	t.Helper()
	c := x.dial(t)
	quit := make(chan struct{})
	var answers int
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		r := bufio.NewReader(c)
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			if _, err := fmt.Fprintln(c, "hello"); err != nil {
				return
			}
			if _, err := r.ReadString('\n'); err != nil {
				return
			}
			answers++
		}
	})
	return sync.OnceValue(func() int {
		close(quit)
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		wg.Wait()
		c.Close()
		return answers
	})
}
