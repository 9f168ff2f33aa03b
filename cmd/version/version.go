// Package version says which version of the programs this is.
package version

import (
	"runtime/debug"
	"strings"
)

// release is set by a build that has no version control to take it from, such as
// a package's: -ldflags "-X cgmanager/cmd/version.release=1.0".
var release string

// String returns the version without a leading v: the release, or else what the
// build recorded, or else "(devel)".
func String() string {
	if release != "" {
		return release
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return strings.TrimPrefix(info.Main.Version, "v")
	}
	return "(devel)"
}
