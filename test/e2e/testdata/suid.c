/*
 * A setuid-root program: says at once where it is, as root, and waits for the
 * end of standard input. It drops nothing and ends by itself after two minutes.
 */
#include <fcntl.h>
#include <unistd.h>

int main(void)
{
	char buf[4096], c;
	int fd = open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, buf, sizeof buf - 1);

	alarm(120);
	if (geteuid() != 0 || n <= 0)
		return 4;
	buf[n++] = '\0'; /* the end of what it says */
	if (write(1, buf, n) != n)
		return 5;
	while (read(0, &c, 1) > 0)
		;
	return 0;
}
