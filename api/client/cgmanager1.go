package client

import (
	"context"

	"github.com/godbus/dbus/v5"
)

// The methods of org.linuxcontainers.CGManager1 (docs/PROTOCOL.md). Names are
// relative to the caller's own cgroup, "" is that cgroup itself; numbers are
// those of the caller's namespaces.

// Version returns the daemon's version, the property Version.
func (c *Client) Version(ctx context.Context) (version string, err error) {
	err = c.call(ctx, properties, "Get", []any{&version}, interface1, "Version")
	return version, err
}

// ListControllers returns the host's controllers.
func (c *Client) ListControllers(ctx context.Context) (controllers []string, err error) {
	err = c.call(ctx, interface1, "ListControllers", []any{&controllers})
	return controllers, err
}

// ListControllersOf returns the controllers in whose hierarchies the cgroup
// exists.
func (c *Client) ListControllersOf(ctx context.Context, name string) (controllers []string, err error) {
	err = c.call(ctx, interface1, "ListControllers", []any{&controllers}, name)
	return controllers, err
}

// Create makes a cgroup with its missing parents in the hierarchies of the
// controllers (none: all but the name= ones) and sets values. It reports
// whether anything was created.
func (c *Client) Create(ctx context.Context, name string, controllers []string, values map[string]string) (created bool, err error) {
	if controllers == nil {
		controllers = []string{}
	}
	if values == nil {
		values = map[string]string{}
	}
	err = c.call(ctx, interface1, "Create", []any{&created}, name, controllers, values)
	return created, err
}

// SetValue sets keys: all of them or, on an error, none.
func (c *Client) SetValue(ctx context.Context, name string, values map[string]string) error {
	return c.call(ctx, interface1, "SetValue", nil, name, values)
}

// GetValue reads keys.
func (c *Client) GetValue(ctx context.Context, name string, keys ...string) (values map[string]string, err error) {
	err = c.call(ctx, interface1, "GetValue", []any{&values}, name, keys)
	return values, err
}

// ListChildren returns the names of the direct children.
func (c *Client) ListChildren(ctx context.Context, name string) (children []string, err error) {
	err = c.call(ctx, interface1, "ListChildren", []any{&children}, name)
	return children, err
}

// ListTasks returns the processes in the cgroup, and the number of those that
// the caller cannot see.
func (c *Client) ListTasks(ctx context.Context, name string) (pids []uint32, hidden uint32, err error) {
	err = c.call(ctx, interface1, "ListTasks", []any{&pids, &hidden}, name)
	return pids, hidden, err
}

// Chown gives the cgroup away; api.NoID leaves an id as it is.
func (c *Client) Chown(ctx context.Context, name string, uid, gid uint32) error {
	return c.call(ctx, interface1, "Chown", nil, name, uid, gid)
}

// Move moves the process pid into the cgroup, or the thread where pid is one
// that does not lead its process.
func (c *Client) Move(ctx context.Context, name string, pid uint32) error {
	return c.call(ctx, interface1, "Move", nil, name, pid)
}

// MoveFd moves the process behind a pidfd (pidfd_open(2)), which stays open.
func (c *Client) MoveFd(ctx context.Context, name string, pidfd int) error {
	return c.call(ctx, interface1, "MoveFd", nil, name, dbus.UnixFD(pidfd))
}

// Delete removes the cgroup and what lies below, if no task is left in it.
func (c *Client) Delete(ctx context.Context, name string) error {
	return c.call(ctx, interface1, "Delete", nil, name)
}

// DeleteForce moves what tasks there are to the parent, then deletes.
func (c *Client) DeleteForce(ctx context.Context, name string) error {
	return c.call(ctx, interface1, "DeleteForce", nil, name)
}

// Kill kills every task in the cgroup and below.
func (c *Client) Kill(ctx context.Context, name string) error {
	return c.call(ctx, interface1, "Kill", nil, name)
}

// Delegate makes the cgroup if need be and gives it to the caller to manage by
// itself: the controllers (none: all that the caller's own cgroup was given)
// can be used below it, its files of delegation are the caller's, and its
// limits are fixed from now on. It returns the cgroup's path as the caller's
// cgroup namespace shows it (/proc/PID/cgroup).
func (c *Client) Delegate(ctx context.Context, name string, controllers []string) (path string, err error) {
	if controllers == nil {
		controllers = []string{}
	}
	err = c.call(ctx, interface1, "Delegate", []any{&path}, name, controllers)
	return path, err
}
