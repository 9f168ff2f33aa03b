package lxc_test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cgmanager/test/harness"
)

// What an image has in place of /sys does not lead the mount hook, which is root
// where the container is privileged, to a directory of the host's.
func TestKernelLXCHookLinks(t *testing.T) {
	harness.Require(t, "root", "unshare")
	hook, err := filepath.Abs("testdata/packaging/hooks/cgmanager-mount")
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ image, want string }{
		"mounted":           {"mkdir -p root/sys/fs/cgroup; mount -t tmpfs none root/sys/fs/cgroup", "root/sys/fs/cgroup/cgmanager"},
		"not mounted":       {"mkdir -p root/sys/fs/cgroup", ""},
		"a link":            {"mkdir -p root/sys/fs; ln -s ../../../host root/sys/fs/cgroup", ""},
		"a link further up": {"mkdir -p host/fs/cgroup; ln -s ../host root/sys; mount -t tmpfs none host/fs/cgroup", ""},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("unshare", "-m", "sh", "-ec", `
mount -t ramfs none "$1" # the directory for tests may be on a tmpfs, which is what is looked for
cd "$1"
mkdir root host
mount -t tmpfs none host
mkdir -p root/run/cgmanager
: >root/run/cgmanager/sock
`+tc.image+`
LXC_ROOTFS_MOUNT=$1/root sh "$2"
find . -name cgmanager | grep -v '^./root/run/'
[ ! -e host/cgmanager ] || echo host
`, "sh", t.TempDir(), hook)
			out, _ := cmd.CombinedOutput()
			if got := strings.TrimPrefix(strings.TrimSpace(string(out)), "./"); got != tc.want {
				t.Errorf("made: %q, want %q", got, tc.want)
			}
		})
	}
}
