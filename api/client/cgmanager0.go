package client

import (
	"context"

	"cgmanager/api"
)

// The methods of org.linuxcontainers.cgmanager0_0 (docs/PROTOCOL.md). A
// controller may be a comma separated list or "all" where the daemon takes
// one; what a leading "/" of a cgroup means differs from method to method.

// Ping0 asks for a sign of life.
func (c *Client) Ping0(ctx context.Context) error {
	return c.call(ctx, interface0, "Ping", nil, int32(0))
}

// APIVersion0 returns the property api_version.
func (c *Client) APIVersion0(ctx context.Context) (version int32, err error) {
	err = c.call(ctx, properties, "Get", []any{&version}, interface0, "api_version")
	return version, err
}

// GetPidCgroup0 returns pid's cgroup, relative to the caller's own.
func (c *Client) GetPidCgroup0(ctx context.Context, controller string, pid int32) (cgroup string, err error) {
	err = c.call(ctx, interface0, "GetPidCgroup", []any{&cgroup}, controller, pid)
	return cgroup, err
}

// GetPidCgroupAbs0 returns pid's cgroup, relative to that of the daemon (or
// of the proxy in between).
func (c *Client) GetPidCgroupAbs0(ctx context.Context, controller string, pid int32) (cgroup string, err error) {
	err = c.call(ctx, interface0, "GetPidCgroupAbs", []any{&cgroup}, controller, pid)
	return cgroup, err
}

// MovePid0 moves a task into a cgroup below the caller's own.
func (c *Client) MovePid0(ctx context.Context, controller, cgroup string, pid int32) error {
	return c.call(ctx, interface0, "MovePid", nil, controller, cgroup, pid)
}

// MovePidAbs0 moves a task into any cgroup: host root only, unless through a
// proxy.
func (c *Client) MovePidAbs0(ctx context.Context, controller, cgroup string, pid int32) error {
	return c.call(ctx, interface0, "MovePidAbs", nil, controller, cgroup, pid)
}

// Create0 makes a cgroup.
func (c *Client) Create0(ctx context.Context, controller, cgroup string) (existed api.Existed, err error) {
	err = c.call(ctx, interface0, "Create", []any{&existed}, controller, cgroup)
	return existed, err
}

// Chown0 gives a cgroup away; -1 leaves an id as it is. The ids are the uid_t
// and gid_t as the interface's int32.
func (c *Client) Chown0(ctx context.Context, controller, cgroup string, uid, gid int32) error {
	return c.call(ctx, interface0, "Chown", nil, controller, cgroup, uid, gid)
}

// Chmod0 changes the mode of a file of the cgroup, or with file "" of its
// directory.
func (c *Client) Chmod0(ctx context.Context, controller, cgroup, file string, mode int32) error {
	return c.call(ctx, interface0, "Chmod", nil, controller, cgroup, file, mode)
}

// GetValue0 reads a control file, without its last newlines.
func (c *Client) GetValue0(ctx context.Context, controller, cgroup, key string) (value string, err error) {
	err = c.call(ctx, interface0, "GetValue", []any{&value}, controller, cgroup, key)
	return value, err
}

// SetValue0 writes a control file.
func (c *Client) SetValue0(ctx context.Context, controller, cgroup, key, value string) error {
	return c.call(ctx, interface0, "SetValue", nil, controller, cgroup, key, value)
}

// Remove0 removes a cgroup without tasks, with the cgroups below it if
// recursive is set.
func (c *Client) Remove0(ctx context.Context, controller, cgroup string, recursive bool) (existed api.Existed, err error) {
	var r int32
	if recursive {
		r = 1
	}
	err = c.call(ctx, interface0, "Remove", []any{&existed}, controller, cgroup, r)
	return existed, err
}

// GetTasks0 returns the tasks of a cgroup, 0 for those the caller cannot see.
func (c *Client) GetTasks0(ctx context.Context, controller, cgroup string) (pids []int32, err error) {
	err = c.call(ctx, interface0, "GetTasks", []any{&pids}, controller, cgroup)
	return pids, err
}

// GetTasksRecursive0 is GetTasks0 with the cgroups below included.
func (c *Client) GetTasksRecursive0(ctx context.Context, controller, cgroup string) (pids []int32, err error) {
	err = c.call(ctx, interface0, "GetTasksRecursive", []any{&pids}, controller, cgroup)
	return pids, err
}

// ListChildren0 returns the names of the direct children.
func (c *Client) ListChildren0(ctx context.Context, controller, cgroup string) (children []string, err error) {
	err = c.call(ctx, interface0, "ListChildren", []any{&children}, controller, cgroup)
	return children, err
}

// RemoveOnEmpty0 has the daemon remove the cgroup once a task has been in it
// and the last one has left.
func (c *Client) RemoveOnEmpty0(ctx context.Context, controller, cgroup string) error {
	return c.call(ctx, interface0, "RemoveOnEmpty", nil, controller, cgroup)
}

// Prune0 removes the empty cgroups below a cgroup.
func (c *Client) Prune0(ctx context.Context, controller, cgroup string) error {
	return c.call(ctx, interface0, "Prune", nil, controller, cgroup)
}

// ListControllers0 returns the host's controllers.
func (c *Client) ListControllers0(ctx context.Context) (controllers []string, err error) {
	err = c.call(ctx, interface0, "ListControllers", []any{&controllers})
	return controllers, err
}

// ListKeys0 returns the files of a cgroup with owners and modes.
func (c *Client) ListKeys0(ctx context.Context, controller, cgroup string) (keys []api.Key, err error) {
	err = c.call(ctx, interface0, "ListKeys", []any{&keys}, controller, cgroup)
	return keys, err
}
