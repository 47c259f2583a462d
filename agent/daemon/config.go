package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/problem"
)

// DefaultConfig is the file that is read if no other is named; it need not exist.
const DefaultConfig = "/etc/ckagent/daemon.toml"

// DefaultStateDir is where a daemon keeps what it protects.
const DefaultStateDir = "/var/lib/ckagent/daemon"

// Config is the daemon's configuration file. Unknown keys are errors, and so are values
// that make no sense. docs/daemon.md describes each key.
type Config struct {
	Socket      string `toml:"socket"`
	SocketGroup string `toml:"socket_group"` // as good as root; empty: root alone
	ReadSocket  string `toml:"read_socket"`  // empty: none
	ReadGroup   string `toml:"read_group"`   // empty: root alone
	StateDir    string `toml:"state_dir"`
	PolicyDir   string `toml:"policy_dir"` // empty: the registry's own default
	Metrics     string `toml:"metrics"`    // loopback address; empty: none

	Limits    Limits    `toml:"limits"`
	Defaults  Defaults  `toml:"defaults"`
	TLS       TLS       `toml:"tls"`
	Rehearsal Rehearsal `toml:"rehearsal"`
	Signals   Signals   `toml:"signals"`
}

// Limits of the host; see package doc.
type Limits struct {
	Checkpoints    int   `toml:"checkpoints"`            // at a time
	StoreBandwidth int64 `toml:"store_bytes_per_second"` // 0: none
	Memory         int64 `toml:"memory_bytes"`           // of all checkpoints together; 0: none but each one's own
}

// Defaults are for what an attach leaves open.
type Defaults struct {
	Store    string   `toml:"store"`
	Interval duration `toml:"interval"`
	Policy   string   `toml:"policy"`
	KeepLast int      `toml:"keep_last"`
	OnDeath  string   `toml:"on_death"`
}

// TLS is a TCP listener for clients that prove who they are by certificate.
type TLS struct {
	Listen   string `toml:"listen"` // empty: none
	Cert     string `toml:"cert"`
	Key      string `toml:"key"`
	ClientCA string `toml:"client_ca"` // who signs clients' certificates: such a client is as good as root
}

// Rehearsal is about test restores.
type Rehearsal struct {
	Every duration `toml:"every"` // of each VM that asks for nothing else; 0: none
	For   duration `toml:"for"`   // how long the guest has to run
}

// Signals is about what policies are told.
type Signals struct {
	DirtyEvery duration `toml:"dirty_every"` // time between two looks at how fast a VM writes its memory; 0: never
}

// duration is a time in a file: "15m".
type duration time.Duration

// UnmarshalText reads it.
func (d *duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = duration(v)
	return err
}

// Standard is the configuration without a file.
func Standard() Config {
	return Config{
		Socket: api.DaemonSocket, ReadSocket: api.ReadSocket, StateDir: DefaultStateDir,
		Limits:    Limits{Checkpoints: 2},
		Defaults:  Defaults{Store: agent.DefaultStore, Interval: duration(agent.DefaultInterval), KeepLast: agent.DefaultKeep, OnDeath: controller.Notify.String()},
		Rehearsal: Rehearsal{For: duration(10 * time.Second)},
		Signals:   Signals{DirtyEvery: duration(5 * time.Minute)},
	}
}

// Load reads a configuration. A file that is not there is problem.NotFound.
func Load(path string) (Config, error) {
	const op = "read configuration"
	c := Standard()
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, problem.New(problem.NotFound, op, path, "%w", err)
	}
	if err != nil {
		return c, problem.New(problem.Failed, op, path, "%w", err)
	}
	meta, err := toml.Decode(string(text), &c)
	if err != nil {
		return c, problem.New(problem.Usage, op, path, "%w", err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		var names []string
		for _, k := range unknown {
			names = append(names, k.String())
		}
		return c, problem.New(problem.Usage, op, path, "unknown: %s", strings.Join(names, ", ")).
			WithHint("docs/daemon.md lists the keys")
	}
	return c, c.Check()
}

// Check refuses what makes no sense.
func (c *Config) Check() error {
	if err := c.check(); err != nil {
		return problem.New(problem.Usage, "check configuration", "", "%w", err).WithHint("docs/daemon.md lists the keys")
	}
	return nil
}

func (c *Config) check() error {
	for name, path := range map[string]string{"socket": c.Socket, "state_dir": c.StateDir, "defaults.store": c.Defaults.Store} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%s %q: want an absolute path", name, path)
		}
	}
	_, known := controller.ParseOnDeath(c.Defaults.OnDeath)
	t := c.TLS
	switch {
	case c.ReadSocket != "" && !filepath.IsAbs(c.ReadSocket):
		return fmt.Errorf("read_socket %q: want an absolute path", c.ReadSocket)
	case c.ReadSocket == c.Socket:
		return errors.New("socket and read_socket are the same")
	case c.Limits.Checkpoints < 1 || c.Limits.Checkpoints > 64:
		return fmt.Errorf("limits.checkpoints %d: want 1 to 64", c.Limits.Checkpoints)
	case c.Limits.StoreBandwidth != 0 && c.Limits.StoreBandwidth < minBandwidth:
		return fmt.Errorf("limits.store_bytes_per_second %d: want 0 or at least %d", c.Limits.StoreBandwidth, int64(minBandwidth))
	case c.Limits.Memory != 0 && c.Limits.Memory/int64(c.Limits.Checkpoints) < minShare:
		return fmt.Errorf("limits.memory_bytes %d: want 0 or at least %d for each of %d checkpoints", c.Limits.Memory, int64(minShare), c.Limits.Checkpoints)
	case time.Duration(c.Defaults.Interval) < agent.MinInterval:
		return fmt.Errorf("defaults.interval %v: want at least %v", time.Duration(c.Defaults.Interval), agent.MinInterval)
	case c.Defaults.KeepLast < 0:
		return fmt.Errorf("defaults.keep_last %d: want 0 or more", c.Defaults.KeepLast)
	case !known:
		return fmt.Errorf("defaults.on_death %q: want notify, restore or none", c.Defaults.OnDeath)
	case c.Rehearsal.Every != 0 && time.Duration(c.Rehearsal.Every) < time.Minute:
		return fmt.Errorf("rehearsal.every %v: want 0 or at least 1m", time.Duration(c.Rehearsal.Every))
	case time.Duration(c.Rehearsal.For) < time.Second:
		return fmt.Errorf("rehearsal.for %v: want at least 1s", time.Duration(c.Rehearsal.For))
	case c.Signals.DirtyEvery != 0 && time.Duration(c.Signals.DirtyEvery) < 2*dirtyFor:
		return fmt.Errorf("signals.dirty_every %v: want 0 or at least %v", time.Duration(c.Signals.DirtyEvery), 2*dirtyFor)
	case t.Listen != "" && (t.Cert == "" || t.Key == "" || t.ClientCA == ""):
		return errors.New("tls.listen wants cert, key and client_ca: nobody is served unproven")
	case t.Listen == "" && t != (TLS{}):
		return errors.New("tls has files, and no listen")
	}
	if t.Listen != "" {
		if _, _, err := net.SplitHostPort(t.Listen); err != nil {
			return fmt.Errorf("tls.listen: %w", err)
		}
	}
	return nil
}
