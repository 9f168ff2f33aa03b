// Package harness runs a real daemon against the real kernel for the
// end-to-end tests: it builds and starts cgmanager, makes cgroups of its own
// in every hierarchy, and starts processes in namespaces at any depth.
//
// A process under test is a puppet: the test binary itself, executed once
// more, which makes the system calls that the test asks for over a control
// socket (connect, sendmsg with chosen credentials, clone into namespaces) and
// hands back what the kernel answered. All logic stays in the test. The D-Bus
// client here is one of its own, so that it does not share the errors of
// api/wire.
//
// A test package that uses the harness calls Main from its TestMain.
package harness
