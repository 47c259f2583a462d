package netid

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/vm"
)

// Conflicts says, one sentence each, who else answers to an address of these cards,
// and which of them are connected to nothing. What cannot be read is no conflict.
func Conflicts(nics []NIC) []string {
	var out []string
	others := otherVMs()
	for i := range nics {
		n := &nics[i]
		if !n.Shared() {
			continue
		}
		for _, o := range others {
			for j := range o.nics {
				if o.nics[j].MAC == n.MAC && o.nics[j].Shared() {
					out = append(out, fmt.Sprintf("the address %s of %s is also that of a card of %s: give one of them another network or end it", n.MAC, n.name(), o.name))
				}
			}
		}
		bridge := n.bridge()
		if bridge == "" {
			if n.Alone && n.Ifname != "" && !exists(n.Ifname) {
				out = append(out, fmt.Sprintf("the tap %s is not there: QEMU makes it, but it is connected to nothing", n.Ifname))
			}
			continue
		}
		if c := learnt(bridge, n); c != "" {
			out = append(out, c)
		}
	}
	return out
}

func (n *NIC) name() string {
	if n.Netdev == "" {
		return "the network card"
	}
	return "netdev " + n.Netdev
}

// --- other QEMU processes

type otherVM struct {
	name string
	nics []NIC
}

// maxCmdline bounds what is read of a process's arguments.
const maxCmdline = 4 << 20

// otherVMs are the QEMU processes that can be seen.
func otherVMs() []otherVM {
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	var out []otherVM
	for _, dir := range procs {
		exe, err := os.Readlink(dir + "/exe")
		if err != nil || !vm.AllowedBinary(strings.TrimSuffix(exe, " (deleted)")) {
			continue
		}
		f, err := os.Open(dir + "/cmdline")
		if err != nil {
			continue
		}
		raw, err := io.ReadAll(io.LimitReader(f, maxCmdline))
		f.Close()
		if err != nil || len(raw) == 0 {
			continue // ended meanwhile
		}
		args := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
		opts, err := cmdline.Parse(args[1:])
		if err != nil {
			continue
		}
		o := otherVM{name: "pid " + filepath.Base(dir), nics: NICs(opts)}
		for _, opt := range opts {
			if opt.Name != "name" {
				continue
			}
			if kv, err := opt.KeyVal(); err == nil {
				if guest, ok := kv.Get("guest"); ok {
					o.name = fmt.Sprintf("VM %s (%s)", guest, o.name)
				}
			}
		}
		out = append(out, o)
	}
	return out
}

// --- bridges

const sysNet = "/sys/class/net/"

func exists(ifname string) bool {
	_, err := os.Lstat(sysNet + filepath.Base(ifname))
	return err == nil
}

// bridge is the bridge that the card is on or will be put on, "" if that cannot be
// told.
func (n *NIC) bridge() string {
	if n.Bridge != "" {
		return n.Bridge
	}
	if n.Ifname == "" {
		return ""
	}
	master, err := os.Readlink(sysNet + filepath.Base(n.Ifname) + "/master")
	if err != nil {
		return ""
	}
	return filepath.Base(master)
}

// An entry of a bridge's table as /sys/class/net/BRIDGE/brforward has it (struct
// __fdb_entry of linux/if_bridge.h).
const (
	fdbEntryBytes = 16
	maxFDB        = 1 << 16 // entries looked at
	userHz        = 100     // the unit of ages, fixed by the kernel's interface
)

// learnt says on which other port of the bridge the card's address was seen.
func learnt(bridge string, n *NIC) string {
	want, err := net.ParseMAC(n.MAC)
	if err != nil {
		return ""
	}
	f, err := os.Open(sysNet + filepath.Base(bridge) + "/brforward")
	if err != nil {
		return ""
	}
	defer f.Close()
	var e [fdbEntryBytes]byte
	for range maxFDB {
		if _, err := io.ReadFull(f, e[:]); errors.Is(err, io.EOF) || err != nil {
			return ""
		}
		port, local := int(e[6])|int(e[12])<<8, e[7] != 0
		if local || !slices.Equal(e[:6], want) {
			continue
		}
		ifname := portName(bridge, port)
		if ifname == n.Ifname {
			continue // where the VM was before
		}
		age := time.Duration(binary.NativeEndian.Uint32(e[8:])) * time.Second / userHz
		return fmt.Sprintf("the address %s of %s was seen %v ago behind %s on the bridge %s: another machine has it, or the VM was there before",
			n.MAC, n.name(), age.Round(time.Second), ifname, bridge)
	}
	return ""
}

// portName is the interface with this number on the bridge.
func portName(bridge string, number int) string {
	ports, err := os.ReadDir(sysNet + filepath.Base(bridge) + "/brif")
	if err != nil {
		return "a port"
	}
	for _, p := range ports {
		raw, err := os.ReadFile(sysNet + p.Name() + "/brport/port_no")
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 0, 32); err == nil && int(n) == number {
			return p.Name()
		}
	}
	return "a port"
}
