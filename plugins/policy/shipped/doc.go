// Package shipped holds the policies that come with ckagent, one a file: what it
// computes, where that comes from, and its parameters. Each is a program of its own
// (cmd/ckagent-policy-NAME); auto is the default.
//
// All are functions of the signals. They share how a time becomes a decision (due):
// the interval counts from the last success, what is overdue is wanted now, and after
// a failure the next attempt waits, longer with every failure in a row.
//
// Failure modes: an unknown or malformed parameter is an error when the policy is
// made. Signals that are missing are replaced by cautious assumptions, which the
// reason names.
package shipped
