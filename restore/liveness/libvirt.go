package liveness

import (
	"context"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/libvirt"
)

// askPatience is how long a daemon has to answer all questions.
const askPatience = 5 * time.Second

// Libvirt asks the daemon that managed a domain whether it runs, or would be
// started by the daemon itself. A domain that is shut off, or that the daemon does
// not know, is no doubt. A daemon that cannot be asked is one.
func Libvirt(ctx context.Context, socket, uri, uuid string) (Doubt, bool) {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	doubt, err := askLibvirt(ctx, socket, uri, uuid)
	if err != nil {
		return Doubt{What: "libvirt manages it and cannot be asked whether it runs: " + err.Error()}, true
	}
	return Doubt{What: doubt}, doubt != ""
}

func askLibvirt(ctx context.Context, socket, uri, uuid string) (doubt string, err error) {
	id, err := hex.DecodeString(strings.ReplaceAll(uuid, "-", ""))
	if err != nil || len(id) != 16 {
		return "", errors.New("its UUID was not recorded")
	}
	if socket == "" {
		return "", errors.New("where its daemon listens was not recorded")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	c, err := libvirt.New(ctx, conn.(*net.UnixConn), uri) // dialled as one
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	dom, err := c.Lookup(ctx, [16]byte(id))
	if libvirt.IsNoDomain(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	state, _, err := c.State(ctx, dom)
	if err != nil {
		return "", err
	}
	if state.Alive() {
		return "libvirt says that domain " + dom.Name + " is " + state.String(), nil
	}
	auto, err := c.Autostart(ctx, dom)
	if err != nil {
		return "", err
	}
	if auto {
		return "libvirt starts domain " + dom.Name + " by itself (virsh autostart --disable " + dom.Name + ")", nil
	}
	return "", nil
}
