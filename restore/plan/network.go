package plan

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/restore/netid"
)

// network treats host networking. A recorded backend is used again as it was,
// unless it came as a descriptor that is gone. A clone has none: user-mode
// networks are cut off from the host, any other becomes a hub with nothing else
// on it, which every QEMU can do.
func (b *builder) network() error {
	before := netid.NICs(b.options())
	if err := b.backends(); err != nil {
		return err
	}
	for i, n := range netid.NICs(b.options()) {
		if !n.Shared() || i >= len(before) {
			continue
		}
		n.MAC = before[i].MAC // the running guest goes on with the one its driver read
		b.plan.NICs = append(b.plan.NICs, n)
	}
	return nil
}

// backends rewrites the network's backends, and a clone's cards.
func (b *builder) backends() error {
	hub := 0x636b00 // far from the small numbers that command lines use
	for e := range b.named("netdev") {
		id := e.get("id")
		if spec, ok := b.maps.netdev(id); ok {
			if spec == "none" {
				if err := b.isolate(e, &hub); err != nil {
					return err
				}
				continue
			}
			kv, err := cmdline.ParseKeyVal(spec, "type")
			if err != nil || strings.HasPrefix(spec, "{") {
				return b.refuse("--map netdev:"+id, "%q is not the value of a -netdev", spec)
			}
			kv.Set("id", id)
			b.change("-netdev "+kv.String(), "mapped")
			e.kv = kv
			continue
		}
		if b.opt.CloneID != "" && !e.mapped["ifname"] && !e.mapped["br"] {
			if err := b.isolate(e, &hub); err != nil {
				return err
			}
			continue
		}
		if err := b.unmade(e); err != nil {
			return err
		}
		for _, key := range []string{"fd", "fds", "vhostfd", "vhostfds", "sock-fds"} {
			if v, ok := e.kv.Get(key); ok && v != "" {
				return b.refuse("netdev "+id, "it used a descriptor (%s=%s) that its manager had opened", key, v).
					WithHint("name a backend: --map netdev:%s=tap,ifname=NAME,script=no,downscript=no, or --map netdev:%s=none", id, id)
			}
		}
		for _, fwd := range e.kv.All("hostfwd") {
			if s, ok := forwardSocket(fwd); ok {
				s.Option = "-netdev " + id
				b.plan.Listen = append(b.plan.Listen, s)
			}
		}
	}
	if b.opt.CloneID == "" {
		for e := range b.named("net", "nic") {
			if _, ok := e.kv.Get("fd"); ok {
				return b.refuse("-"+e.Name+" "+e.Value, "it used a descriptor that its manager had opened").
					WithHint("name the network in the VM's command line with -netdev and -device; -%s cannot be mapped", e.Name)
			}
			for _, fwd := range e.kv.All("hostfwd") {
				if s, ok := forwardSocket(fwd); ok {
					s.Option = "-" + e.Name
					b.plan.Listen = append(b.plan.Listen, s)
				}
			}
		}
		return nil
	}
	for e := range b.named("net", "nic") {
		switch t := e.get("type"); t {
		case "nic", "none", "hubport":
			if _, ok := e.kv.Get("macaddr"); ok || t == "nic" {
				b.setMAC(e, "macaddr", e.get("id")+e.get("model"))
			}
			continue
		}
		keep := map[string]string{}
		for _, key := range []string{"id", "model", "mac", "macaddr", "addr", "vectors", "netdev"} {
			if v, ok := e.kv.Get(key); ok {
				keep[key] = v
			}
		}
		kv, _ := cmdline.ParseKeyVal("user,restrict=on", "type")
		if b.needsTap(e, "") {
			if b.rec.UID != 0 {
				return b.refuse("-nic "+e.Value, "without a network it needs a tap of its own, which uid %d may not make", b.rec.UID).
					WithHint("name the network in the VM's command line with -netdev and -device; -nic cannot be mapped")
			}
			kv, _ = cmdline.ParseKeyVal("tap,script=no,downscript=no", "type")
		}
		for _, key := range slices.Sorted(mapKeys(keep)) {
			kv.Set(key, keep[key])
		}
		e.kv = kv
		if e.Name == "nic" {
			b.setMAC(e, "mac", keep["id"]+keep["model"])
		}
		b.change("-"+e.Name+" "+kv.String(), "a clone has no network unless mapped")
	}
	for e := range b.named("device") {
		if e.get("netdev") != "" || e.get("mac") != "" {
			b.setMAC(e, "mac", e.get("id")+"/"+e.get("netdev"))
		}
	}
	return nil
}

// isolate cuts a netdev off from the host and from the original.
func (b *builder) isolate(e *entry, hub *int) error {
	id := e.get("id")
	queues := e.get("queues")
	switch {
	case b.needsTap(e, id):
		// Its offloads are part of the device state, and only a tap has them. This
		// one is up for nobody and connected to nothing.
		if b.rec.UID != 0 {
			return b.refuse("netdev "+id, "without a network it needs a tap of its own, which uid %d may not make", b.rec.UID).
				WithHint("make one for that user and map it: --map netdev:%s=tap,ifname=NAME,script=no,downscript=no", id)
		}
		e.kv, _ = cmdline.ParseKeyVal("tap,id="+cmdline.Escape(id)+",script=no,downscript=no", "type")
		if queues != "" {
			e.kv.Set("queues", queues)
		}
	case queues != "" && queues != "1" || e.get("fds") != "":
		return b.refuse("netdev "+id, "it has several queues, which no isolated network offers").
			WithHint("map it: --map netdev:%s=tap,ifname=NAME,queues=N,script=no,downscript=no", id)
	case e.get("type") == "user":
		for _, key := range []string{"hostfwd", "guestfwd", "smb", "tftp", "bootfile"} {
			e.kv.Delete(key)
		}
		e.kv.SetBool("restrict", true)
	default:
		e.kv, _ = cmdline.ParseKeyVal("hubport,id="+cmdline.Escape(id)+",hubid="+strconv.Itoa(*hub), "type")
		*hub++
	}
	why := "no network was asked for"
	if b.opt.CloneID != "" {
		why = "a clone has no network unless mapped: --map netdev:" + id + "=BACKEND"
	}
	b.change("-netdev "+e.kv.String(), why)
	return nil
}

// needsTap reports whether a card on this backend was saved with a tap's offloads
// (virtio-net's vnet_hdr) and cannot be loaded without.
func (b *builder) needsTap(e *entry, id string) bool {
	if t := e.get("type"); t != "tap" && t != "bridge" || e.get("vnet_hdr") == "off" {
		return false
	}
	if e.Name == "nic" {
		return strings.HasPrefix(e.get("model"), "virtio")
	}
	for d := range b.named("device") {
		if d.get("netdev") == id && strings.HasPrefix(d.get("driver"), "virtio-net") {
			return true
		}
	}
	return false
}

// setMAC gives a clone's card an address of its own. The running guest goes on
// with the one its driver read; the new one counts from its next boot.
func (b *builder) setMAC(e *entry, key, card string) {
	mac := cloneMAC(b.opt.CloneID, card)
	e.kv.Set(key, mac)
	b.change("-"+e.Name+" "+e.get("driver")+" "+key+"="+mac, "a clone has addresses of its own; the running guest sees it after its next boot")
}

// cloneMAC derives a locally administered unicast address.
func cloneMAC(clone, card string) string {
	h := sha256.Sum256([]byte("mac\x00" + clone + "\x00" + card))
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", h[0]&^1|2, h[1], h[2], h[3], h[4], h[5])
}

// cloneUUID derives a random-looking (version 4 layout) UUID.
func cloneUUID(clone, old string) string {
	h := sha256.Sum256([]byte("uuid\x00" + clone + "\x00" + old))
	h[6], h[8] = h[6]&0x0f|0x40, h[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[0:4], h[4:6], h[6:8], h[8:10], h[10:16])
}

// forwardSocket is the host side of hostfwd=tcp:HOST:PORT-...
func forwardSocket(fwd string) (Socket, bool) {
	proto, rest, ok := strings.Cut(fwd, ":")
	if !ok {
		return Socket{}, false
	}
	if proto == "" {
		proto = "tcp"
	}
	host, _, ok := strings.Cut(rest, "-")
	if !ok || proto != "tcp" && proto != "udp" {
		return Socket{}, false
	}
	return Socket{Network: proto, Address: host}, true
}

func mapKeys(m map[string]string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}
