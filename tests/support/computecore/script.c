/* What the test wants of the next calls: each turn is taken once, in order, by its kind of call. */
#include "fake.h"

#include <stdlib.h>
#include <string.h>

static Turn *turns;

Turn *turn_take(Call call) {
    for (Turn **at = &turns; *at; at = &(*at)->next)
        if ((*at)->call == call) {
            Turn *turn = *at;
            *at = turn->next;
            return turn;
        }
    return NULL;
}

void turn_free(Turn *turn) {
    if (turn)
        free(turn->document);
    free(turn);
}

void turns_forget(void) {
    while (turns) {
        Turn *turn = turns;
        turns = turn->next;
        turn_free(turn);
    }
}

/* See `When`; for AT_END a code of 0 is a success, after so many milliseconds. */
EXPORT void fake_script(int call, int when, int32_t code, const char *document, int milliseconds) {
    Turn *turn = calloc(1, sizeof *turn), **at = &turns;
    *turn = (Turn){
        .call = (Call)call,
        .when = (When)when,
        .code = code,
        .document = document ? strdup(document) : NULL,
        .milliseconds = milliseconds,
    };
    pthread_mutex_lock(&lock);
    while (*at)
        at = &(*at)->next;
    *at = turn;
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_calm(void) {
    pthread_mutex_lock(&lock);
    turns_forget();
    pthread_mutex_unlock(&lock);
}

EXPORT int fake_unused_turns(void) {
    pthread_mutex_lock(&lock);
    int count = 0;
    for (Turn *turn = turns; turn; turn = turn->next)
        count++;
    pthread_mutex_unlock(&lock);
    return count;
}
