// Package plugins is the place of the policy plugins' host: the registry of the
// programs that decide when and how a VM is checkpointed, their generations and
// their health. This version has none: checkpoints are taken on demand or at the
// interval given to `ckagent attach`, and no other package depends on this one.
package plugins
