package netid

import (
	"net"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// NIC is a network card of a guest and what it is connected to.
type NIC struct {
	MAC    string `json:"mac"`              // as the guest knows it
	Netdev string `json:"netdev,omitempty"` // id of the backend
	Type   string `json:"type"`             // of the backend: tap, bridge, user, ...
	Ifname string `json:"ifname,omitempty"` // of a tap
	Bridge string `json:"bridge,omitempty"` // that QEMU's helper puts it on
	Alone  bool   `json:"alone,omitempty"`  // QEMU runs no script that would connect the tap
}

// Shared reports whether others may be on the card's network: a user-mode network
// or a hub is its QEMU's own, and so is a tap that it makes and connects to nothing.
func (n *NIC) Shared() bool {
	switch n.Type {
	case "", "user", "hubport", "none":
		return false
	}
	return !n.Alone || n.Ifname != ""
}

// NICs lists the cards that a command line makes. A card without an address gets
// QEMU's next one.
func NICs(opts []cmdline.Option) []NIC {
	backends := map[string]*cmdline.KeyVal{}
	var legacy *cmdline.KeyVal // the one network of -net
	var cards []*cmdline.KeyVal
	var plugged []*cmdline.KeyVal
	for _, o := range opts {
		if o.Name != "netdev" && o.Name != "nic" && o.Name != "net" && o.Name != "device" {
			continue
		}
		kv, err := o.KeyVal()
		if err != nil {
			continue
		}
		typ, _ := kv.Get("type")
		switch {
		case o.Name == "netdev":
			id, _ := kv.Get("id")
			backends[id] = kv
		case o.Name == "device":
			if id, ok := kv.Get("netdev"); ok && id != "" {
				plugged = append(plugged, kv)
			}
		case o.Name == "nic" && typ != "none", typ == "nic":
			cards = append(cards, kv)
		case o.Name == "net":
			legacy = kv
		}
	}
	// QEMU gives addresses to -nic and -net first.
	var out []NIC
	for _, kv := range cards {
		from := kv
		if typ, _ := kv.Get("type"); typ == "nic" { // of -net
			from = legacy
		}
		out = append(out, newNIC(kv, from))
	}
	for _, kv := range plugged {
		id, _ := kv.Get("netdev")
		n := newNIC(kv, backends[id])
		n.Netdev = id
		out = append(out, n)
	}
	number(out)
	return out
}

func newNIC(card, backend *cmdline.KeyVal) NIC {
	var n NIC
	for _, key := range []string{"mac", "macaddr"} {
		if v, ok := card.Get(key); ok {
			n.MAC = canonical(v)
		}
	}
	if backend == nil {
		return n
	}
	n.Type, _ = backend.Get("type")
	n.Netdev, _ = backend.Get("id")
	n.Ifname, _ = backend.Get("ifname")
	n.Bridge, _ = backend.Get("br")
	if n.Type == "bridge" && n.Bridge == "" {
		n.Bridge = "br0" // QEMU's default
	}
	script, given := backend.Get("script")
	fd, _ := backend.Get("fd")
	n.Alone = n.Type == "tap" && n.Bridge == "" && fd == "" && given && (script == "no" || script == "")
	return n
}

// canonical is an address in the form in which two are compared.
func canonical(s string) string {
	if hw, err := net.ParseMAC(s); err == nil {
		return hw.String()
	}
	return strings.ToLower(s)
}

// number gives addresses to those that have none, as QEMU does: from
// 52:54:00:12:34:56 on, what is taken left out.
func number(nics []NIC) {
	taken := map[string]bool{}
	for i := range nics {
		taken[nics[i].MAC] = true
	}
	next := net.HardwareAddr{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}
	for i := range nics {
		for nics[i].MAC == "" {
			if s := next.String(); !taken[s] {
				nics[i].MAC = s
			}
			next[5]++
			if next[5] == 0x56 {
				return // all 256 are taken: QEMU would not start
			}
		}
	}
}
