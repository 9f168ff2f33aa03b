package identity

import (
	"bytes"
	"errors"
	"strconv"
)

// Stopped reports whether no thread of the process runs: each is stopped
// (SIGSTOP, ptrace) or has ended. A signal to stop is acted upon on the way out
// of the kernel; until then a thread may finish what it is about to do there,
// execve(2) of a setuid program included.
func (t *Task) Stopped() (bool, error) {
	tids, err := t.Threads()
	if err != nil {
		return false, err
	}
	for _, tid := range tids {
		b, err := t.read("task/" + strconv.Itoa(int(tid)) + "/stat")
		if errors.Is(err, ErrGone) {
			continue
		}
		if err != nil {
			return false, err
		}
		// The name before the state is the program's own choice, and may
		// have a parenthesis in it (proc_pid_stat(5)).
		i := bytes.LastIndex(b, []byte(") "))
		if i < 0 || i+2 >= len(b) {
			return false, errMalformed
		}
		if !bytes.ContainsRune([]byte("TtZX"), rune(b[i+2])) {
			return false, nil
		}
	}
	return true, nil
}
