package e2e_test

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	apiclient "cgmanager/api/client"
	"cgmanager/test/harness"
)

// goClient makes the calls of package client that no program here makes.
var goClient = harness.Inside("Go client", func(sock string) (moved bool, err error) {
	pid, err := startSleeper()
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, reap(pid)) }()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(pidfd)
	ctx := context.Background()
	c, err := apiclient.DialAddress(ctx, sock)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.Chown(ctx, "given", 1000, 1001); err != nil {
		return false, err
	}
	if err := c.MoveFd(ctx, "forced", pidfd); err != nil {
		return false, err
	}
	tasks, hidden, err := c.ListTasks(ctx, "forced")
	if err != nil {
		return false, err
	}
	moved = hidden == 0 && len(tasks) == 1 && tasks[0] == uint32(pid)
	if err := c.Delete(ctx, "forced"); err == nil {
		return moved, errors.New("Delete with a task in it was not refused")
	}
	return moved, c.DeleteForce(ctx, "forced")
})

func TestKernelGoClient(t *testing.T) {
	w := newWorld(t)
	for _, cg := range []string{"own", "own/given", "own/forced"} {
		w.Make(cg, 0, 0)
	}
	var moved bool
	if err := w.host(0, "own").Run(goClient, w.sock(), &moved); err != nil || !moved {
		t.Errorf("the process was moved: %v, %v", moved, err)
	}
	h := harness.Find(t, "freezer")
	want(t, "the owner", w.owner(h, "own/given", ""), "1000:1001")
	want(t, "what was deleted is there", w.Exists(h, "own/forced"), false)
}
