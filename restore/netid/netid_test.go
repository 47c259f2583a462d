package netid

import (
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/cmdline"
)

func parse(t *testing.T, line string) []cmdline.Option {
	t.Helper()
	opts, err := cmdline.Parse(strings.Fields(line))
	if err != nil {
		t.Fatal(err)
	}
	return opts
}

// The numbers are QEMU's own: `info network` of these command lines says the same.
func TestNICs(t *testing.T) {
	for _, c := range []struct {
		name, line string
		want       []NIC
	}{
		{"none", "-machine q35", nil},
		{"plugged", "-netdev tap,id=a,ifname=t0 -device virtio-net-pci,netdev=a,mac=52:54:00:AA:00:01",
			[]NIC{{MAC: "52:54:00:aa:00:01", Netdev: "a", Type: "tap", Ifname: "t0"}}},
		{"JSON", `-netdev {"type":"tap","id":"a","ifname":"t0","script":"no"} -device {"driver":"e1000","netdev":"a"}`,
			[]NIC{{MAC: "52:54:00:12:34:56", Netdev: "a", Type: "tap", Ifname: "t0", Alone: true}}},
		{"numbered around what is taken", "-netdev user,id=a -device e1000,netdev=a -netdev user,id=b -device e1000,netdev=b,mac=52:54:00:12:34:56",
			[]NIC{{MAC: "52:54:00:12:34:57", Netdev: "a", Type: "user"}, {MAC: "52:54:00:12:34:56", Netdev: "b", Type: "user"}}},
		{"-nic comes first", "-device e1000,netdev=a -netdev user,id=a -nic bridge,model=e1000",
			[]NIC{{MAC: "52:54:00:12:34:56", Type: "bridge", Bridge: "br0"}, {MAC: "52:54:00:12:34:57", Netdev: "a", Type: "user"}}},
		{"-net", "-net nic,macaddr=52:54:00:00:00:09 -net tap,ifname=t3", []NIC{{MAC: "52:54:00:00:00:09", Type: "tap", Ifname: "t3"}}},
		{"no card", "-nic none -netdev user,id=a", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := NICs(parse(t, c.line)); !slices.Equal(got, c.want) {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
		})
	}
}

func TestShared(t *testing.T) {
	for _, c := range []struct {
		nic  NIC
		want bool
	}{
		{NIC{Type: "user"}, false}, {NIC{Type: "hubport"}, false}, {NIC{}, false},
		{NIC{Type: "tap", Ifname: "t0", Alone: true}, true}, {NIC{Type: "bridge", Bridge: "br0"}, true},
		{NIC{Type: "tap", Alone: true}, false}, // made by QEMU, connected to nothing
		{NIC{Type: "tap"}, true}, {NIC{Type: "socket"}, true},
	} {
		if got := c.nic.Shared(); got != c.want {
			t.Errorf("%+v: shared is %v", c.nic, got)
		}
	}
}

// More cards than addresses must end.
func TestAllTaken(t *testing.T) {
	nics := make([]NIC, 300)
	number(nics)
	seen := map[string]bool{}
	for _, n := range nics[:256] {
		if n.MAC == "" || seen[n.MAC] {
			t.Fatalf("address %q", n.MAC)
		}
		seen[n.MAC] = true
	}
	if nics[299].MAC != "" {
		t.Errorf("the 300th has %q", nics[299].MAC)
	}
}
