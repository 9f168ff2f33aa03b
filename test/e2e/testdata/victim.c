/*
 * What the tests move and kill. Every process ends by itself after two minutes,
 * those of a bomb after 20 seconds.
 *
 *   victim pause        wait for the end of standard input
 *   victim exec PROG    wait for a byte, then execute PROG
 *   victim bomb         wait for a byte, then fork without end; every child too
 *   victim fork N       wait for a byte, then fork N times, say how often that
 *                       went well, and end
 *   victim eat N        wait for a byte, then use N MiB of memory, say "ate", and
 *                       end
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void bomb(void)
{
	unsigned seed = getpid();

	alarm(20);
	signal(SIGCHLD, SIG_IGN); /* children leave no zombies */
	for (;;) {
		pid_t pid = fork();

		if (pid == 0) {
			alarm(20);
			seed = getpid();
		} else if (pid < 0) {
			usleep(500);
		} else {
			/* Some parents go, so that the tree keeps moving. */
			seed = seed * 1103515245 + 12345;
			if (seed >> 28 == 0)
				_exit(0);
		}
	}
}

static int forks(int n)
{
	int made = 0, hold[2];
	char c;

	if (pipe(hold))
		return 3;
	for (int i = 0; i < n; i++) {
		pid_t pid = fork();

		if (pid == 0) {
			alarm(120);
			close(hold[1]);
			_exit(read(hold[0], &c, 1) != 0);
		}
		if (pid > 0)
			made++;
	}
	close(hold[1]); /* lets them end */
	while (wait(NULL) > 0)
		;
	return dprintf(1, "%d", made) < 0;
}

static int eat(size_t mib)
{
	char *p = malloc(mib << 20);

	if (!p)
		return 3;
	memset(p, 1, mib << 20);
	return dprintf(1, "ate") < 0 || p[mib] != 1;
}

int main(int argc, char **argv)
{
	char c;

	alarm(120);
	if (argc < 2)
		return 2;
	ssize_t n = read(0, &c, 1);

	if (!strcmp(argv[1], "pause"))
		return 0;
	if (n != 1)
		return 1;
	if (!strcmp(argv[1], "exec") && argc == 3) {
		char *args[] = { argv[2], NULL };

		execv(argv[2], args);
		return 3;
	}
	if (!strcmp(argv[1], "bomb"))
		bomb();
	if (!strcmp(argv[1], "fork") && argc == 3)
		return forks(atoi(argv[2]));
	if (!strcmp(argv[1], "eat") && argc == 3)
		return eat(atoi(argv[2]));
	return 2;
}
