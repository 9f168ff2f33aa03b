package client

import (
	"context"
	"fmt"

	"github.com/godbus/dbus/v5"

	"cgmanager/api"
)

// The requests about realtime: of org.linuxcontainers.CGManager1, whose errors say
// what to do, and of rtkit's org.freedesktop.RealtimeKit1, whose errors say no more
// than rtkit's do (docs/PROTOCOL.md). Numbers of threads and processes are those of
// the caller's pid namespace.

// ListGrants returns the grants that the caller may know of, the oldest first.
func (c *Client) ListGrants(ctx context.Context) (grants []api.Grant, err error) {
	err = c.call(ctx, interface1, "ListGrants", []any{&grants})
	return grants, err
}

// Grant gives a thread a scheduling policy: "rr" or "fifo" with a priority, or "other"
// with a nice level.
func (c *Client) Grant(ctx context.Context, thread uint32, policy string, level int32) error {
	return c.call(ctx, interface1, "Grant", nil, thread, policy, level)
}

// Revoke takes a thread's grant back.
func (c *Client) Revoke(ctx context.Context, thread uint32) error {
	return c.call(ctx, interface1, "Revoke", nil, thread)
}

// GrantLimits raises the resource limits of a process to what the host's policy gives
// it, and returns them by name.
func (c *Client) GrantLimits(ctx context.Context, pid uint32) (limits map[string]string, err error) {
	err = c.call(ctx, interface1, "GrantLimits", []any{&limits}, pid)
	return limits, err
}

// RevokeLimits takes them back from the process and its descendants, and returns those
// that could not be reached.
func (c *Client) RevokeLimits(ctx context.Context, pid uint32) (unreached []uint32, err error) {
	err = c.call(ctx, interface1, "RevokeLimits", []any{&unreached}, pid)
	return unreached, err
}

// MakeThreadRealtime gives a thread realtime scheduling at a priority, as rtkit does.
func (c *Client) MakeThreadRealtime(ctx context.Context, t api.Thread, priority uint32) error {
	return c.makeThread(ctx, "MakeThreadRealtime", t, priority)
}

// MakeThreadHighPriority gives a thread a nice level, as rtkit does.
func (c *Client) MakeThreadHighPriority(ctx context.Context, t api.Thread, nice int32) error {
	return c.makeThread(ctx, "MakeThreadHighPriority", t, nice)
}

func (c *Client) makeThread(ctx context.Context, method string, t api.Thread, level any) error {
	if t.Own {
		return c.callRealtime(ctx, method, t.ID, level)
	}
	return c.callRealtime(ctx, method+"WithPID", t.Process, t.ID, level)
}

// ResetKnown takes back every grant of the host.
func (c *Client) ResetKnown(ctx context.Context) error {
	return c.callRealtime(ctx, "ResetKnown")
}

// ResetAll makes every realtime thread of the host SCHED_OTHER but root's.
func (c *Client) ResetAll(ctx context.Context) error {
	return c.callRealtime(ctx, "ResetAll")
}

// ExitRealtime takes back every grant, and ends the realtime service: the daemon serves
// cgroups on.
func (c *Client) ExitRealtime(ctx context.Context) error {
	return c.callRealtime(ctx, "Exit")
}

// RealtimeProperties returns the bounds of what is granted.
func (c *Client) RealtimeProperties(ctx context.Context) (p api.RealtimeProperties, err error) {
	var all map[string]dbus.Variant
	if err := c.callAt(ctx, c.realtime, properties, "GetAll", []any{&all}, api.RealtimeInterface); err != nil {
		return p, err
	}
	for name, to := range map[string]any{
		"RTTimeUSecMax":       &p.RTTimeUSecMax,
		"MaxRealtimePriority": &p.MaxRealtimePriority,
		"MinNiceLevel":        &p.MinNiceLevel,
	} {
		v, ok := all[name]
		if !ok {
			return p, fmt.Errorf("reply to GetAll: no property %s", name)
		}
		if err := v.Store(to); err != nil {
			return p, fmt.Errorf("reply to GetAll: property %s: %w", name, err)
		}
	}
	return p, nil
}

func (c *Client) callRealtime(ctx context.Context, method string, in ...any) error {
	return c.callAt(ctx, c.realtime, api.RealtimeInterface, method, nil, in...)
}
